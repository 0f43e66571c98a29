"""What bench_inference.py serve measures: a Poisson load of mixed prompts on our engine, at several rates.

Requests come at the clock of rank 0, which tells the other ranks before every step what time it is. Times are what a
caller sees: from a request's arrival to its first token, and from there on by token. Prompts' and answers' lengths are
log-uniform. With --soak the load is one of all kinds: sampled in every way, cancelled at any time, over-long and
malformed, with prefixes kept and states handed out, and what must hold is checked after each third: every accepted
request is answered or cancelled, those and only those that are wrong are refused, by the field that is wrong, states
are of their conversations, nothing stalls, all slots are free, kept prefixes are within their bytes, memory does not
grow after the first third. Where something does not hold the soak ends, and the status is 1. Prompts are cancelled
while they are read only where they are longer than a pass (--max-tokens).
"""

import argparse
from collections.abc import Iterator
from math import inf
from statistics import quantiles
from time import perf_counter
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from bench_models import AUTO, free_memory, reader
from bench_options import Asked, Setting, add_common, check_counts, check_pure_ssm
from measure import in_words, markdown
from report_files import write_json, write_plot
from serve_load import Arrival, Load
from serve_loop import Clock, Served, Serving

from megatron_ssm_tp.cli.console import is_speaker, say
from megatron_ssm_tp.errors import UserError, renamed
from megatron_ssm_tp.inference.engine import SlotEngine
from megatron_ssm_tp.inference.prefix_cache import PrefixCache
from megatron_ssm_tp.inference.requests import check_seed

KEPT = 8  # states after prefixes, of a soak
GPU_GROWTH, HOST_GROWTH = 64 << 20, 256 << 20  # bytes that a soak may end with more than it had after a third


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rates", nargs="+", type=float, default=[4.0], metavar="R", help="requests a second (4)")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--seconds", type=float, default=30.0, help="that requests come, at each rate (30)")
    how_long.add_argument(
        "--requests", type=int, metavar="N", help="so many at each rate, however long they take to come"
    )
    how_long.add_argument("--soak", type=float, metavar="SECONDS", help="one load of all kinds, checked")
    parser.add_argument(
        "--stall-seconds",
        type=float,
        default=30.0,
        help="that a request of a soak may be without progress, queued or not (30)",
    )
    parser.add_argument("--prompt-tokens", nargs=2, type=int, default=[32, 2048], metavar=("MIN", "MAX"))
    parser.add_argument("--new-tokens", nargs=2, type=int, default=[16, 256], metavar=("MIN", "MAX"))
    parser.add_argument("--max-requests", type=int, default=64, help="slots")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of prompts in a pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="times to the first token and by token, as a picture")
    add_common(parser)


def check(args: argparse.Namespace, asked: Asked) -> None:
    """Raises UserError: anything that would fail only later."""
    check_pure_ssm(asked)
    for option in ("rates", "seconds", "soak", "stall_seconds"):
        value = getattr(args, option)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not 0 < one < 1e6:
                raise UserError(f"--{option.replace('_', '-')}", one, "is out of range", "a positive number")
    for option in ("prompt_tokens", "new_tokens"):
        low, high = getattr(args, option)
        check_counts(f"--{option.replace('_', '-')}", [low], "tokens")
        check_counts(f"--{option.replace('_', '-')}", [high], "tokens", low)
    check_counts("--requests", [args.requests] if args.requests is not None else [], "requests")
    check_counts("--max-requests", [args.max_requests], "slots")
    check_counts("--max-tokens", [args.max_tokens], "tokens")
    with renamed("--{}".format):
        check_seed(args.seed)
    if args.soak and (args.plot or len(args.rates) > 1):
        option, value = ("--plot", args.plot) if args.plot else ("--rates", args.rates)
        raise UserError(option, value, "is not of a soak, which has one rate and no picture", "one rate, no --plot")
    if args.recipes != [AUTO]:
        raise UserError("--recipes", args.recipes, "are not compared here", AUTO)


def run(setting: Setting) -> str | None:
    """Measure and report; what does not hold in a soak."""
    args, rows, broken, ranks = setting.args, [], [], setting.groups.tp.size()
    if ranks > 1:
        say(f"Of {ranks} ranks: a broadcast of rank 0's clock before every step is included in all times.")
    clock = Clock(setting.groups.tp)
    try:
        for name, (config, _) in setting.asked.models.items():
            engine, began = setting.model(name).engine(args.max_requests, args.max_tokens), perf_counter()
            engine.warm_up()
            say(f"{name}: kernels compiled and graphs made in {perf_counter() - began:.0f} s")
            if args.soak:
                found = _soak(name, engine, args, config.vocab_size, setting.groups.tp, clock, rows)
                broken += [f"the soak of {name} does not hold: {', '.join(found)}"] if found else []
                continue
            for rate in args.rates:
                load = _load(args, rate, config.vocab_size)
                arrivals = load.arrivals(inf if args.requests else args.seconds, args.requests)
                rows.append(_row(name, rate, _serving(engine, args, config.vocab_size, clock, arrivals).run()))
    finally:
        if rows and is_speaker():
            _report(args, setting.conditions, rows)
    return "; ".join(broken) or None


def _load(args: argparse.Namespace, rate: float, vocab_size: int, soak_part: int | None = None) -> Load:
    lengths, seed = (tuple(args.prompt_tokens), tuple(args.new_tokens)), args.seed + (soak_part or 0)
    return Load(rate, *lengths, vocab_size, seed, mixed=soak_part is not None)


def _serving(
    engine: SlotEngine, args: argparse.Namespace, vocab_size: int, clock: Clock, arrivals: Iterator[Arrival]
) -> Serving:
    longest = args.prompt_tokens[1] + args.new_tokens[1]
    return Serving(engine, reader(engine.table, vocab_size, longest), clock, arrivals)


# --- Load -----------------------------------------------------------------------------------------------------------


def _percentiles(values: list[float]) -> tuple[float, float]:
    """p50 and p99, in milliseconds."""
    if len(values) < 2:
        return (values[0] * 1e3, values[0] * 1e3) if values else (0.0, 0.0)
    cuts = quantiles(values, n=100, method="inclusive")
    return cuts[49] * 1e3, cuts[98] * 1e3


def _row(model: str, rate: float, served: Served) -> dict:
    """What is reported of a rate; times in milliseconds."""
    answers = served.answers
    first = _percentiles([answer.first - answer.came for answer in answers])
    each = _percentiles([(a.last - a.first) / (a.tokens - 1) for a in answers if a.tokens > 1])
    tokens = sum(answer.tokens for answer in answers)
    return {
        "model": model,
        "rate": rate,
        "requests": len(answers),
        "seconds": served.seconds,
        "tokens_per_second": tokens / served.seconds,
        "prompt_tokens_per_second": sum(answer.prompt for answer in answers) / served.seconds,
        "ttft_ms": first,
        "tpot_ms": each,
        "idle": served.idle / served.seconds,
    }


def _report(args: argparse.Namespace, found: dict[str, str], rows: list[dict]) -> None:
    if not args.soak:
        header = ["model", "requests/s", "answered", "new tokens/s", "prompt tokens/s"]
        header += ["first token, ms: p50", "p99", "each token after it, ms: p50", "p99", "idle"]
        lines = []
        for row in rows:
            times = [f"{ms:.1f}" for ms in (*row["ttft_ms"], *row["tpot_ms"])]
            speeds = [f"{row[key]:.0f}" for key in ("tokens_per_second", "prompt_tokens_per_second")]
            lines.append(
                [row["model"], f"{row['rate']:g}", str(row["requests"]), *speeds, *times, f"{row['idle']:.0%}"]
            )
        say(f"\n{markdown(header, lines)}\n")
    write_json(args.json, {"conditions": found, "options": vars(args), "rows": rows})
    if args.plot and not args.soak:
        _plot(rows, args.plot, in_words(found))


def _plot(rows: list[dict], path: str, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, key, label in zip(axes, ("ttft_ms", "tpot_ms"), ("first token", "each token after it"), strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            for index, name in enumerate(("p50", "p99")):
                axis.plot([r["rate"] for r in own], [r[key][index] for r in own], marker="o", label=f"{model}, {name}")
        axis.set(xlabel="requests/s", ylabel="ms", title=label, ylim=(0, None))
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=7, wrap=True)
    write_plot(figure, path)


# --- Soak -----------------------------------------------------------------------------------------------------------


class _Memory(NamedTuple):
    """Bytes of tensors on the GPU but kept prefixes, of this process on the host, and what of these are pages of files
    that it maps."""

    gpu: int
    host: int
    files: int

    @classmethod
    def now(cls, kept: int) -> "_Memory":
        found = psutil.Process().memory_info()
        on_gpu = torch.cuda.memory_allocated() - kept if torch.cuda.is_available() else 0
        return cls(on_gpu, found.rss, getattr(found, "shared", 0))


def _soak(
    name: str,
    engine: SlotEngine,
    args: argparse.Namespace,
    vocab_size: int,
    group: dist.ProcessGroup,
    clock: Clock,
    rows: list[dict],
) -> list[str]:
    """Three equal parts of a load of all kinds; what does not hold, the same on all ranks. Memory that grows is watched
    to the end: whether it goes on growing tells what it is."""
    total, memory = Served(), []
    engine.prefixes = PrefixCache(KEPT * engine.table.snapshot(0).nbytes)
    # asked once before: the first collective makes NCCL's communicator, 350 MiB of the host's memory that stay
    broken = _of_all_ranks(set(), group)
    while len(memory) < 3 and broken <= {"GPU memory", "host memory"}:
        arrivals = _load(args, args.rates[0], vocab_size, len(memory)).arrivals(args.soak / 3)
        served = _serving(engine, args, vocab_size, clock, arrivals).run(args.stall_seconds)
        total = total + served
        free_memory()
        memory.append(_Memory.now(engine.prefixes.nbytes))
        broken |= _of_all_ranks(set(_broken(engine, args, served, memory)), group)
    row = {
        "seconds": round(total.seconds, 1),
        "accepted": total.accepted,
        "answered": len(total.answers),
        "cancelled": dict(total.cancelled),
        "refused": dict(total.refused),
        "prompts that began with a kept prefix": engine.prefixes.counts.hits,
        "tokens": sum(answer.tokens for answer in total.answers),
        "longest without progress, s": round(total.longest_wait, 2),
        "GPU memory after each third, MiB": [one.gpu >> 20 for one in memory],
        "host memory, MiB": [one.host >> 20 for one in memory],
        "of it pages of files, MiB": [one.files >> 20 for one in memory],
    }
    rows.append({"model": name, **row, "broken": sorted(broken)})
    say(f"\n{markdown([name, 'soak'], [[key, _shown(value)] for key, value in row.items()])}\n")
    if not broken:
        say("The soak holds.\n")
    return sorted(broken)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in sorted(value.items())) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _of_all_ranks(own: set[str], group: dist.ProcessGroup) -> set[str]:
    everyone: list[set[str]] = [set()] * group.size()
    dist.all_gather_object(everyone, own, group=group)
    return set().union(*everyone)


def _broken(engine: SlotEngine, args: argparse.Namespace, served: Served, memory: list[_Memory]) -> Iterator[str]:
    """What does not hold on this rank, after a part of a soak."""
    if served.accepted != len(served.answers) + served.cancelled.total() or engine.has_unfinished:
        yield "unanswered"
    if served.longest_wait > args.stall_seconds:
        yield "stalled"
    if sorted(engine.free_slots) != list(range(args.max_requests)) or bool(engine.table.alive.any()):
        yield "slots"
    if memory[-1].gpu - memory[0].gpu > GPU_GROWTH:
        yield "GPU memory"
    if memory[-1].host - memory[0].host > HOST_GROWTH:
        yield "host memory"
    if served.misjudged:
        yield "refusals"
    if served.misled:
        yield "states"
    if engine.prefixes.nbytes > engine.prefixes.budget:
        yield "prefixes"
    if not (served.accepted or served.refused):
        yield "no request came"
