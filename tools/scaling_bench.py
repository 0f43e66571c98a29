"""What bench_inference.py scaling measures: the same models on 1, 2 and 4 ranks of one machine, in one go.

Run it as a plain process: it starts torchrun for each number of ranks, and measures prefill, decoding and whole
requests there, the sums between ranks as the engine chooses (in bfloat16 on GPUs kernels of this package in steps and
in passes that are graphs, Megatron's all-reduce in others) and by recipes; then as many one-rank processes at once,
each with a GPU of its own (data parallelism). Ratios are to one rank. What is not measured is left out and said. The
longest prompt in 40 GB is where the line through the peaks of the two longest single prompts reaches it; no such prompt
is run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_models import AUTO
from bench_options import add_common, check_counts, read_common
from bench_shapes import MODELS
from measure import NO_MULTICAST, conditions, in_words, markdown
from prefill_bench import ENGINE, check_seconds
from report_files import write_json, write_plot

from megatron_ssm_tp.cli.console import say
from megatron_ssm_tp.errors import UserError, renamed

TOOL = Path(__file__).parent / "bench_inference.py"
BUDGET = 40e9  # bytes of a GPU, for the longest prompt
REPLICAS = "replicas"
WHAT = ("prefill", "decode", "requests")
_PATIENCE = 30.0  # seconds that torchrun may take to end its ranks
_LONGEST_REQUEST = 8192  # tokens of a prompt, of whole requests


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], metavar="N", help="TP sizes (1 2 4)")
    parser.add_argument("--what", nargs="+", default=list(WHAT), metavar="WHAT", help=f"of {', '.join(WHAT)} (all)")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768, 65536], metavar="TOKENS")
    parser.add_argument("--prompts", nargs="+", type=int, default=[1, 8], metavar="N", help="at once (1 8)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], metavar="N", help="of decoding (1 8 64)")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="of whole requests (128)")
    parser.add_argument("--plot", metavar="FILE", help="speed-up of prefill by length, as a picture")
    parser.add_argument("--seconds", type=float, metavar="S", help="as of prefill, for each of its figures (3)")
    add_common(parser, models=tuple(MODELS))
    parser.set_defaults(recipes=[AUTO, "int8"])


def check(args: argparse.Namespace) -> None:
    """Raises UserError: anything that would fail only later."""
    for option, what in (("lengths", "tokens"), ("prompts", "prompts"), ("batches", "requests"), ("ranks", "ranks")):
        check_counts(f"--{option}", getattr(args, option), what)
    check_counts("--new-tokens", [args.new_tokens], "tokens")
    for what in args.what:
        if what not in WHAT:
            raise UserError("--what", what, "is nothing that is measured here", ", ".join(WHAT))
    check_seconds(args)
    if 1 not in args.ranks:
        raise UserError("--ranks", args.ranks, "has nothing to compare with", "1 and others")
    for ranks in args.ranks:
        with renamed(lambda field: "--ranks" if field == "--nproc-per-node" else field):
            read_common(_on_one_rank(args) if ranks == 1 else args, ranks)
    if not _parts(args, 1):
        raise UserError("--what", args.what, f"has nothing to measure: {'; '.join(_left_out(args))}", WHAT[0])
    if args.plot and not ("prefill" in args.what and max(args.ranks) > 1 and 1 in args.prompts):
        problem = "shows prefill of single prompts over one rank's, which is not asked for"
        raise UserError("--plot", args.plot, problem, "no --plot")
    gpus = torch.cuda.device_count()
    if gpus and max(args.ranks) > gpus:
        raise UserError("--ranks", max(args.ranks), "are more than this machine's GPUs", f"1 to {gpus}")


def _on_one_rank(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | {"recipes": [AUTO]})


@dataclass(frozen=True)
class Found:
    """A figure, more of which is better: `what` (prefill, decode, requests) of `shape` a second, by `way`."""

    model: str
    what: str
    shape: tuple[int, int]  # prompts and tokens of each; requests and 1
    ranks: int
    way: str
    a_second: float
    peak_gb: float | None = None


def run(args: argparse.Namespace) -> None:
    check(args)
    os.environ.update(NO_MULTICAST)
    words = conditions(torch.device("cuda" if torch.cuda.is_available() else "cpu")) | {"gpus": _gpus()}
    say(in_words(words) + "\n")
    found: list[Found] = []
    notes = _left_out(args)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for ranks in sorted(args.ranks):
                found += _measured(args, ranks, Path(folder), notes)
                if ranks > 1:
                    found += _replicas(args, ranks, Path(folder), notes)
    except KeyboardInterrupt:
        notes.append("interrupted: what comes after these was not measured")
        raise
    finally:
        if found:
            _report(args, words, found, notes)


def _gpus() -> str:
    return str(torch.cuda.device_count())


# --- Measuring ------------------------------------------------------------------------------------------------------


def _parts(args: argparse.Namespace, ranks: int) -> list[tuple[str, list[str]]]:
    """Subcommands of bench_inference.py that are asked for, and their options."""
    return [(command, options) for command, options in _all_parts(args, ranks) if command in args.what]


def _all_parts(args: argparse.Namespace, ranks: int) -> Iterator[tuple[str, list[str]]]:
    """Our engine is asked for what it can run."""
    pure, hybrids = _by_engine(args)
    common = ["--dtype", args.dtype, *(["--layers", str(args.layers)] if args.layers else [])]
    common += ["--recipes", *(args.recipes if ranks > 1 else [AUTO])]
    shapes = [f"{prompts}x{length}" for prompts in args.prompts for length in args.lengths]
    seconds = ["--seconds", str(args.seconds)] if args.seconds else []
    prefill = ["--shapes", *shapes, *seconds, *common]
    if hybrids:
        yield "prefill", ["--models", *hybrids, *prefill]
    if pure:
        yield "prefill", ["--models", *pure, "--passes", ENGINE, *prefill]
        yield "decode", ["--models", *pure, "--batches", *map(str, args.batches), *common]
        lengths = [length for length in args.lengths if length <= _LONGEST_REQUEST]
        short = [f"{prompts}x{length}" for prompts in args.prompts for length in lengths]
        if short:
            yield "requests", ["--models", *pure, "--shapes", *short, "--new-tokens", str(args.new_tokens), *common]


def _left_out(args: argparse.Namespace) -> list[str]:
    """What is asked for and not measured by any subcommand."""
    pure, hybrids = _by_engine(args)
    found = []
    for what in (what for what in args.what if what != "prefill"):
        found += [f"{what}: not of {name}, whose engine is Megatron's" for name in hybrids]
    long = [str(length) for length in args.lengths if length > _LONGEST_REQUEST]
    if "requests" in args.what and pure and long:
        found.append(f"requests: not of {', '.join(long)} tokens, but of {_LONGEST_REQUEST} at most")
    return found


def _by_engine(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of the models that our engine runs, and of others."""
    configs = [config for config, _ in read_common(_on_one_rank(args), 1).models.values()]
    pure = [name for name, config in zip(args.models, configs, strict=True) if config.is_pure_ssm]
    return pure, [name for name in args.models if name not in pure]


def _start(command: str, options: list[str], ranks: int, report: Path, gpu: int | None = None) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": str(gpu)} if gpu is not None else {})
    words = [sys.executable, *launcher, str(TOOL), command, *options, "--json", str(report)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _ended(process: subprocess.Popen, what: str, notes: list[str]) -> bool:
    """Whether a part went well; else its last line is a note."""
    try:
        errors = process.communicate()[1].strip().splitlines()
    finally:
        process.terminate()  # where the wait was interrupted; else it has ended
        process.wait(_PATIENCE)
    if process.returncode:
        notes.append(f"{what}: ended with status {process.returncode}: {errors[-1] if errors else ''}")
    return process.returncode == 0


def _measured(args: argparse.Namespace, ranks: int, folder: Path, notes: list[str]) -> list[Found]:
    found = []
    for part, (command, options) in enumerate(_parts(args, ranks)):
        report = folder / f"{part}-{ranks}.json"
        say(f"{command} on {ranks} rank{'s' if ranks > 1 else ''}")
        _ended(_start(command, options, ranks, report), f"{command} on {ranks}", notes)
        if report.exists():
            found += _read(command, json.loads(report.read_text()), ranks, notes)
    return found


def _replicas(args: argparse.Namespace, ranks: int, folder: Path, notes: list[str]) -> list[Found]:
    """As many processes of one rank at once: the sum of what they do a second."""
    sums: dict[tuple, Found] = {}
    for part, (command, options) in enumerate(_parts(args, 1)):
        say(f"{command} on {ranks} replicas")
        reports = [folder / f"{part}-{ranks}-{index}.json" for index in range(ranks)]
        on_gpus = torch.cuda.is_available()
        started = [_start(command, options, 1, report, i if on_gpus else None) for i, report in enumerate(reports)]
        try:
            ended = [_ended(process, f"{command} on {ranks} replicas", notes) for process in started]  # all of them
        finally:
            for process in started:
                process.terminate()
                process.wait(_PATIENCE)
        if not all(ended):
            continue
        for report in reports:
            for one in _read(command, json.loads(report.read_text()), ranks, notes):
                key = (one.model, one.what, one.shape)
                before = sums[key].a_second if key in sums else 0.0
                whole = Found(*key, ranks, REPLICAS, before + one.a_second, one.peak_gb)
                sums[key] = whole
    return list(sums.values())


def _read(command: str, report: dict, ranks: int, notes: list[str]) -> Iterator[Found]:
    """The figures of this package in a subcommand's report."""
    for cell in report["cells"]:
        shape = (cell["batch"], cell.get("length", 1))
        words = cell.get("way", "megatron_ssm_tp").split(", ")
        words = [word for word in words if word != ENGINE and not word.endswith(" states")]
        if words[0] != "megatron_ssm_tp":
            continue
        way = cell.get("recipe") or (words[1] if len(words) > 1 else AUTO)
        seconds = cell["ms"] * 1e-3 if cell.get("ms") else cell.get("seconds")
        if not seconds:
            notes.append(f"{command}, {cell['model']}, {shape[0]}x{shape[1]} on {ranks}, {way}: {cell['note']}")
            continue
        count = shape[0] * shape[1] if command == "prefill" else shape[0]
        yield Found(cell["model"], command, shape, ranks, way, count / seconds, cell.get("peak_gb"))


# --- Report ---------------------------------------------------------------------------------------------------------


def _one(found: list[Found], of: Found) -> float | None:
    """The same on one rank."""
    return next(
        (f.a_second for f in found if (f.model, f.what, f.shape) == (of.model, of.what, of.shape) and f.ranks == 1),
        None,
    )


def table(found: list[Found]) -> str:
    """Markdown: a row a model and shape, a column a number of ranks and way; a second, and over one rank."""
    columns = sorted({(f.ranks, f.way == REPLICAS, f.way) for f in found})
    columns = [(ranks, way) for ranks, _, way in columns]
    header = ["model", "what a second", "prompts x tokens", *(f"{ranks}: {way}" for ranks, way in columns)]
    rows = []
    for model, what, shape in dict.fromkeys((f.model, f.what, f.shape) for f in found):
        by_column = {(f.ranks, f.way): f for f in found if (f.model, f.what, f.shape) == (model, what, shape)}
        cells = [_cell(by_column.get(column), found) for column in columns]
        unit = {"prefill": "prompt tokens", "decode": "tokens", "requests": "requests"}[what]
        rows.append([model, unit, f"{shape[0]}x{shape[1]}", *cells])
    return markdown(header, rows)


def _cell(one: Found | None, found: list[Found]) -> str:
    if one is None:
        return "-"
    base, shown = _one(found, one), f"{one.a_second:.0f}" if one.a_second >= 100 else f"{one.a_second:.2f}"
    return shown if one.ranks == 1 or base is None else f"{shown} ({one.a_second / base:.2f})"


def longest_prompts(found: list[Found]) -> dict[tuple[str, int], int]:
    """Tokens of a single prompt that fit into BUDGET, by model and ranks, where two peaks are known and differ."""
    longest = {}
    for model, ranks in dict.fromkeys((f.model, f.ranks) for f in found):
        own = [f for f in found if (f.model, f.ranks, f.what, f.way) == (model, ranks, "prefill", AUTO)]
        peaks = sorted({f.shape[1]: f.peak_gb * 1e9 for f in own if f.shape[0] == 1 and f.peak_gb}.items())[-2:]
        if len(peaks) == 2 and peaks[1][1] > peaks[0][1]:
            (short, low), (long, high) = peaks
            longest[model, ranks] = int(long + (BUDGET - high) * (long - short) / (high - low))
    return longest


def _report(args: argparse.Namespace, words: dict[str, str], found: list[Found], notes: list[str]) -> None:
    say(f"\n{table(found)}\n")
    longest = longest_prompts(found)
    if longest:
        rows = [[model, str(ranks), str(tokens)] for (model, ranks), tokens in longest.items()]
        say(f"{markdown(['model', 'ranks', f'longest prompt in {BUDGET / 1e9:.0f} GB a GPU'], rows)}\n")
    for note in notes:
        say(f"- {note}")
    listed = [vars(one) | {"over_one_rank": _over(one, found)} for one in found]
    rest = {f"{model}, {ranks}": tokens for (model, ranks), tokens in longest.items()}
    content = {"conditions": words, "options": vars(args), "found": listed, "longest_prompts": rest, "notes": notes}
    write_json(args.json, content)
    if args.plot:
        _plot(found, args.plot, in_words(words))


def _over(one: Found, found: list[Found]) -> float | None:
    base = _one(found, one)
    return one.a_second / base if base else None


def _plot(found: list[Found], path: str, words: str) -> None:
    """Prefill of single prompts: a panel a number of ranks, a line a model, the best of its ways but replicas."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    several = sorted({f.ranks for f in found if f.ranks > 1})
    figure, axes = pyplot.subplots(1, max(1, len(several)), figsize=(6 * max(1, len(several)), 4.5), squeeze=False)
    for axis, ranks in zip(axes.flat, several, strict=False):
        for model in dict.fromkeys(f.model for f in found):
            best: dict[int, float] = {}
            for one in found:
                fits = (one.model, one.ranks, one.what, one.shape[0]) == (model, ranks, "prefill", 1)
                if fits and one.way != REPLICAS and _over(one, found):
                    best[one.shape[1]] = max(best.get(one.shape[1], 0.0), _over(one, found))
            axis.plot(sorted(best), [best[length] for length in sorted(best)], marker="o", label=model)
        axis.axhline(ranks, color="grey", linewidth=0.5)
        axis.set(
            xlabel="tokens of a prompt",
            ylabel="times as fast as one rank",
            title=f"{ranks} ranks, the fastest way of each",
        )
        lengths = sorted({f.shape[1] for f in found if f.what == "prefill"})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, map(str, lengths))
        axis.legend(fontsize=7)
    figure.suptitle(words, fontsize=7, wrap=True)
    write_plot(figure, path)
