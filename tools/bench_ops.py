"""How fast single operators run: this package's Triton kernels beside mamba-ssm's and causal-conv1d's, on one GPU.

    python tools/bench_ops.py

Scan and convolution of prompts, and their one-token steps. Every time is of calls in a CUDA graph, the median of 10 to
50 replays. Each call of a step's graph has tensors of its own, as layers have: 64 calls, or as many as come to 128 MB.

The floor is what the work would take if nothing but its bytes, or nothing but its exponentials and their like, counted:
each tensor read or written once at --bandwidth; N + 3 special functions a token and channel of a scan, 2 of a
convolution, 16 a clock on each SM. Errors are against ops/reference.py in float64, from zero states, on the first
channels. The reference itself is timed where that does not take long.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import NamedTuple

import torch
from measure import (
    captured,
    conditions,
    in_words,
    markdown,
    seconds,
    tried,
    version_of,
)
from op_cases import FUNCTIONS, Case, Given, as_packed, call, draw, exact, ours, relative, rival
from op_floor import Floor, bytes_of, floor_of, special_functions
from options import read_shape
from report_files import check_reports, write_json, write_plot

from megatron_ssm_tp.cli.console import Parser, guarded, say
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.ops import reference

TAPS = 4  # of the convolutions
_STEP_BYTES, _STEP_CALLS, _PROMPT_CALLS = 128e6, 64, 2
_CHECKED_CHANNELS = 64
_LARGEST_REFERENCE = 1 << 24  # tokens x channels x states


class Row(NamedTuple):
    """What was measured of one case; `note` says what was not, and why."""

    case: Case
    bytes: int
    special: int
    floor_us: float
    us: float | None = None
    theirs_us: float | None = None
    reference_us: float | None = None
    error: float | None = None
    state_error: float | None = None
    their_error: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.theirs_us / self.us if self.us and self.theirs_us else None

    @property
    def shape(self) -> str:
        return f"{len(self.case.lengths)}x{self.case.lengths[0]}"


# --- Options --------------------------------------------------------------------------------------------------------


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ops", nargs="+", default=list(FUNCTIONS), metavar="OP", help=", ".join(map(repr, FUNCTIONS)))
    made.add_argument("--channels", type=int, nargs="+", default=[8192, 4096], metavar="D")
    made.add_argument("--d-state", type=int, default=16, metavar="N")
    made.add_argument("--shapes", nargs="+", default=["1x8192", "8x2048"], metavar="PROMPTSxTOKENS")
    made.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="requests of a step")
    made.add_argument("--clock", type=float, metavar="GHZ", help="of the SMs; nvidia-smi's, while a scan runs")
    made.add_argument("--bandwidth", type=float, metavar="TB/S", help="of the memory; a large copy's")
    made.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    made.add_argument("--plot", metavar="FILE", help="shares of the floor, as a picture")
    return made.parse_args(argv)


def read_cases(args: argparse.Namespace) -> list[Case]:
    """Raises UserError: anything that would fail only later."""
    for op in args.ops:
        if op not in FUNCTIONS:
            raise UserError("--ops", op, "unknown", ", ".join(map(repr, FUNCTIONS)))
    for option in ("channels", "batches", "d_state"):
        values = getattr(args, option)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise UserError(f"--{option.replace('_', '-')}", value, "is too few", "integers from 1")
    for option in ("clock", "bandwidth"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise UserError(f"--{option}", value, "bounds nothing", "more than 0")
    check_reports(args.json, args.plot)
    prompts = [_lengths(text) for text in args.shapes]
    cases = []
    for op in args.ops:
        for channels in args.channels:
            for lengths in [(1,) * batch for batch in args.batches] if op.endswith("step") else prompts:
                cases.append(Case(op, lengths, channels, args.d_state if op.startswith("scan") else TAPS))
    return cases


def _lengths(text: str) -> tuple[int, ...]:
    batch, length = read_shape(text)
    return (length,) * batch


# --- Measuring ------------------------------------------------------------------------------------------------------


def measure(case: Case, floor: Floor, device: torch.device) -> Row:
    """The row of one case. What fails is a note."""
    row = Row(case, bytes_of(case), special_functions(case), floor.seconds(case) * 1e6)
    calls = min(_STEP_CALLS, max(2, round(_STEP_BYTES / row.bytes))) if case.is_step else 1
    given, note = tried(lambda: [draw(case, device) for _ in range(calls)], device)
    if given is None:
        return row._replace(note=note)
    notes = []

    def attempted[T](name: str, step: Callable[[], T]) -> T | None:
        result, failed = tried(step, device)
        notes.extend([f"{name}: {failed}"] if failed else [])
        return result

    def timed(name: str, make: Callable[[Given], Callable[[], object] | None], in_graph: bool = True) -> float | None:
        def step() -> float | None:
            runs = [make(one) for one in given]
            return None if None in runs else _seconds(runs, case, device, in_graph) * 1e6

        return attempted(name, step)

    few = min(case.channels, _CHECKED_CHANNELS)
    truth = attempted("float64", lambda: exact(case, given[0], few))
    if truth is not None:
        errors = attempted("errors", lambda: _errors(case, given[0], truth)) or (None, None)
        beside = attempted("their error", lambda: _their_error(case, given[0], truth[0]))
        row = row._replace(error=errors[0], state_error=errors[1], their_error=beside)
    row = row._replace(
        us=timed("ours", lambda one: lambda: call(case, ours(case), one)),
        theirs_us=timed("theirs", lambda one: rival(case, one)),
    )
    if sum(case.lengths) * case.channels * case.width <= _LARGEST_REFERENCE:
        own = getattr(reference, FUNCTIONS[case.op])
        row = row._replace(reference_us=timed("reference", lambda one: lambda: call(case, own, one), in_graph=False))
    else:
        notes.append("reference: too large to be timed")
    return row._replace(note="; ".join(notes))


def _seconds(runs: list[Callable[[], object]], case: Case, device: torch.device, in_graph: bool) -> float:
    """A call's time; the runs are of the same case on tensors of their own."""
    runs = runs if case.is_step else runs * _PROMPT_CALLS

    def all_of_them() -> None:
        for run in runs:
            run()

    all_of_them()
    if device.type != "cuda" or not in_graph:
        return seconds(all_of_them, device) / len(runs)
    graph, _ = captured(all_of_them)
    return seconds(graph.replay, device) / len(runs)


def _errors(case: Case, given: Given, truth: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Of y and states on the first channels; given's states, zeros, are left so."""
    few = truth[0].shape[1]
    copied = given._replace(states=given.states.clone())
    y = call(case, ours(case), copied)
    return relative(y[:, :few], truth[0]), relative(copied.states[:, :few], truth[1])


def _their_error(case: Case, given: Given, y: torch.Tensor) -> float | None:
    theirs = rival(case, given)  # of a step, with a copy of the states
    return relative(as_packed(case, theirs())[:, : y.shape[1]], y) if theirs else None


# --- Output ---------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Markdown, a row a case."""
    header = ["op", "D", "N", "requests x tokens", "us", "theirs us", "times as fast", "reference us", "GB/s", "MB"]
    header += ["M special functions", "floor us", "share of the floor", "error", "theirs", "states' error"]
    lines = []
    for row in rows:
        case, us = row.case, row.us
        values = [(us, ".1f"), (row.theirs_us, ".1f"), (row.ratio, ".2f"), (row.reference_us, ".0f")]
        values += [(row.bytes / us * 1e-3 if us else None, ".0f"), (row.bytes / 1e6, ".1f"), (row.special / 1e6, ".1f")]
        values += [(row.floor_us, ".1f"), (row.floor_us / us if us else None, ".0%")]
        values += [(row.error, ".2e"), (row.their_error, ".2e"), (row.state_error, ".1e")]
        shown = [format(value, form) if value is not None else "-" for value, form in values]
        lines.append([case.op, str(case.channels), str(case.width), row.shape, *shown])
    return markdown(header, lines)


def notes(rows: list[Row]) -> str:
    """What was not measured, and why."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for note in filter(None, row.note.split("; ")):
            reasons.setdefault(note, []).append(f"{row.case.op} {row.case.channels} {row.shape}")
    found = [f"- {reason}; at {', '.join(at)}" for reason, at in reasons.items()]
    return "\nNot measured:\n" + "\n".join(found) if found else ""


def plot(rows: list[Row], path: str, title: str) -> None:
    """Times as multiples of the floor: two bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.us]
    figure, axis = pyplot.subplots(figsize=(10, 0.4 * len(shown) + 2), layout="constrained")
    for index, (name, key) in enumerate((("ours", "us"), ("mamba-ssm, causal-conv1d", "theirs_us"))):
        points = [
            (at + 0.4 * index, getattr(row, key) / row.floor_us) for at, row in enumerate(shown) if getattr(row, key)
        ]
        bars = axis.barh([at for at, _ in points], [value for _, value in points], 0.4, label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
    axis.set_yticks([at + 0.2 for at in range(len(shown))], [f"{r.case.op} {r.case.channels} {r.shape}" for r in shown])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xlabel="time by the floor's")
    axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=7, wrap=True)
    write_plot(figure, path)


def report(args: argparse.Namespace, found: dict[str, str], floor: Floor, rows: list[Row]) -> None:
    say(f"{table(rows)}\n{notes(rows)}")
    if args.json:
        listed = [
            row._asdict() | {"case": asdict(row.case) | {"dtype": str(row.case.dtype)}, "ratio": row.ratio}
            for row in rows
        ]
        content = {"conditions": found, "floor": floor.words, "rows": listed}
        write_json(args.json, content)
    if args.plot:
        plot(rows, args.plot, f"{in_words(found)}. {floor.words}")


def run(args: argparse.Namespace) -> None:
    began, cases = perf_counter(), read_cases(args)
    if not torch.cuda.is_available():
        raise UserError("device", "CPU", "Triton's kernels are not for it", "a CUDA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    found = conditions(device) | {package: version_of(package) for package in ("mamba-ssm", "causal-conv1d")}
    rows: list[Row] = []
    with torch.no_grad():
        floor = floor_of(device, args.bandwidth, args.clock, args.channels[0])
        say(f"{in_words(found)}\n\n{floor.words}\n")
        try:
            for case in cases:
                rows.append(measure(case, floor, device))
        finally:
            if rows:
                report(args, found, floor, rows)
    say(f"\n{perf_counter() - began:.0f} s in all.")


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(read_args())))
