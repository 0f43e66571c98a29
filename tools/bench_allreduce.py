"""How long tensor-parallel all-reduces take: NCCL's, torch's, and every recipe by every backend, on bfloat16.

    torchrun --standalone --nproc-per-node 2 tools/bench_allreduce.py    # Markdown

Ratios are to the best of NCCL eager and NCCL in a CUDA graph: above 1 is faster. Times are those of the slowest rank,
medians of 50 runs (of fewer where a run takes more than 2 ms); in a graph, of 10 calls (of 2 where a call takes more
than 1 ms). A second table adds what follows in a model, the residual's addition and the RMS norm: NCCL and one kernel
for both, against the fused all-reduce. With gloo, on a CPU, only the tool itself can be tried.
"""

import argparse
import sys
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ssm_tp import quiet_imports

with quiet_imports():
    from bench_ways import KINDS, Case, Result, Way, Ways
    from measure import (
        captured,
        conditions,
        in_words,
        largest,
        markdown,
        same_bits,
        seconds,
        start,
        tried,
    )
    from report_files import check_reports, write_json, write_plot

    from megatron_ssm_tp.cli.console import Parser, guarded, is_speaker, say
    from megatron_ssm_tp.comm.recipes import Bf16
    from megatron_ssm_tp.errors import UserError, renamed
    from megatron_ssm_tp.ranks import agree, lost_peers_reported

TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)
HIDDEN = (2560, 4096)
TITLES = {"sum": "all-reduce", "fused": "all-reduce, residual addition and RMS norm"}
_LONG_CALL = 1e-3  # seconds
_TIMEOUT_S = 120.0  # a hang ends within it


class Cell(NamedTuple):
    """What was measured of one way at one size; `note` says why it was not."""

    table: str  # a key of TITLES
    hidden: int
    tokens: int
    way: str
    rival: bool
    us: float | None = None
    error: float | None = None
    same_bits: bool | None = None
    note: str = ""
    ratio: float | None = None


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="N")
    made.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN), metavar="N")
    made.add_argument("--ways", nargs="+", default=list(KINDS), metavar="WAY", help=", ".join(KINDS))
    made.add_argument("--graph-limit", type=int, default=2048, metavar="N", help="most tokens in a CUDA graph")
    made.add_argument("--block-size", type=int, default=128, metavar="N", help="values that share a scale")
    made.add_argument("--wide-residual", action="store_true", help="a residual stream in float32, as Falcon-Mamba's")
    made.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    made.add_argument("--plot", metavar="FILE", help="time by tokens, as a picture")
    return made.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises UserError: anything that would fail only later."""
    for option in ("tokens", "hidden"):
        for value in getattr(args, option):
            if value < (1 if option == "tokens" else 8):
                raise UserError(f"--{option}", value, "is too few", f"integers from {1 if option == 'tokens' else 8}")
    for way in args.ways:
        if way not in KINDS:
            raise UserError("--ways", way, "unknown", ", ".join(KINDS))
    with renamed("--block-size"):
        Bf16(block_size=args.block_size)
    check_reports(args.json, args.plot)


def measure(way: Way, exact: Result, cell: Cell, device: torch.device, graphs: bool) -> list[Cell]:
    """The way's cells at one size: eager, and in a graph. What fails is a note."""
    if way.refresh is not None:
        way.refresh()
    result, note = tried(way.run, device)
    if result is None:
        return [cell._replace(note=note)]
    eager = _judged(cell, result, exact, device)
    del result
    time = seconds(way.run, device, way.refresh)
    cells = [eager._replace(us=time * 1e6)] if way.eager else []
    if not (graphs and way.graph):
        return cells
    found = cell._replace(way=f"{cell.way}, graph")
    calls = 10 if time < _LONG_CALL else 2
    made, note = tried(lambda: captured(_repeated(way.run, calls)), device)
    if made is None:
        return [*cells, found._replace(note=note)]
    graph, result = made
    graph.replay()
    if way.refresh is None:
        found = _judged(found, result, exact, device)
    else:  # what sums in place has summed 10 times: its error is that of the eager call
        found = found._replace(error=eager.error, same_bits=same_bits_of(result))
    return [*cells, found._replace(us=seconds(graph.replay, device, way.refresh) / calls * 1e6)]


def _repeated(run: Callable[[], Result], calls: int) -> Callable[[], Result]:
    def repeated() -> Result:
        for _ in range(calls - 1):
            run()
        return run()

    return repeated


def _judged(cell: Cell, result: Result, exact: Result, device: torch.device) -> Cell:
    """The cell with the largest relative error of the result's tensors on any rank, and whether all ranks agree."""
    norm = torch.linalg.vector_norm
    errors = [(norm(x.float() - y) / norm(y)).item() for x, y in zip(result, exact, strict=True)]
    return cell._replace(error=largest(max(errors), device), same_bits=same_bits_of(result))


def same_bits_of(result: Result) -> bool:
    return all(same_bits(x) for x in result)


def measure_all(args: argparse.Namespace, ways: Ways, device: torch.device, cells: list[Cell]) -> None:
    """Appends to `cells`, so that what was measured before an error is there."""
    for hidden in args.hidden:
        for tokens in args.tokens:
            case = Case(tokens, hidden, device, args.wide_residual)
            graphs = device.type == "cuda" and tokens <= args.graph_limit
            for table, of_table, exact in (("sum", ways.sums, case.sums), ("fused", ways.fused, case.fused())):
                found = []
                for way in of_table(case):
                    cell = Cell(table, hidden, tokens, way.name, way.rival)
                    found += measure(way, exact, cell, device, graphs)
                best = min((cell.us for cell in found if cell.rival and cell.us is not None), default=None)
                cells += [cell._replace(ratio=best / cell.us) if best and cell.us else cell for cell in found]


def tables(cells: list[Cell], hidden: int) -> str:
    """Markdown: for each table of this hidden size a row a way and a column a size."""
    parts = []
    for table, title in TITLES.items():
        of_table = [cell for cell in cells if (cell.table, cell.hidden) == (table, hidden)]
        if not of_table:
            continue
        sizes = list(dict.fromkeys(cell.tokens for cell in of_table))
        header = ["way", *(f"{n} ({_size(2 * n * hidden)})" for n in sizes), "relative error", "same bits"]
        rows = []
        for way in dict.fromkeys(cell.way for cell in of_table):
            row = {cell.tokens: cell for cell in of_table if cell.way == way}
            rows.append([way, *(_shown(row.get(n)) for n in sizes), *_verdict(list(row.values()))])
        parts.append(f"Hidden size {hidden}, {title}: us (ratio) by tokens\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"


def _shown(cell: Cell | None) -> str:
    if cell is None or cell.us is None:
        return "-"
    return f"{cell.us:.1f}" + (f" ({cell.ratio:.2f})" if cell.ratio else "")


def _verdict(cells: list[Cell]) -> list[str]:
    """The largest error, and at how many tokens ranks got different bits."""
    errors = [cell.error for cell in cells if cell.error is not None]
    different = [str(cell.tokens) for cell in cells if cell.same_bits is False]
    if not errors:
        return ["-", "-"]
    return [f"{max(errors):.1e}", f"NOT at {', '.join(different)}" if different else "yes"]


def notes(cells: list[Cell], missing: dict[str, str]) -> str:
    """What was not measured, and why."""
    found = [f"- {kind}: {reason}" for kind, reason in missing.items()]
    reasons: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.note:
            reasons.setdefault(f"{cell.way} ({TITLES[cell.table]}): {cell.note}", []).append(cell)
    found += [f"- {text}; at {', '.join(f'{c.tokens} x {c.hidden}' for c in of)}" for text, of in reasons.items()]
    return "\nNot measured:\n" + "\n".join(found) if found else ""


def plot(cells: list[Cell], path: str, title: str) -> None:
    """How many times as fast as NCCL, by tokens: a panel a table, a line a way at its better of eager and graph."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((cell.hidden, cell.table) for cell in cells))
    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(14, 6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (hidden, table) in zip(axes.flat, panels, strict=False):
        axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        of_panel = [cell for cell in cells if (cell.hidden, cell.table) == (hidden, table) and cell.ratio]
        best: dict[str, dict[int, float]] = {}
        for cell in of_panel:
            points = best.setdefault(cell.way.removesuffix(", graph"), {})
            points[cell.tokens] = max(cell.ratio, points.get(cell.tokens, 0))
        for way, points in best.items():
            axis.plot(points.keys(), points.values(), "--" if way.startswith("nccl") else "-", marker=".", label=way)
        axis.set(xscale="log", xlabel="tokens", ylabel="times as fast as NCCL", ylim=(0, None))
        axis.set_title(f"hidden size {hidden}: {TITLES[table]}", fontsize=9)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=7, wrap=True)
    write_plot(figure, path)


def report(args: argparse.Namespace, found: dict[str, str], cells: list[Cell], missing: dict[str, str]) -> None:
    say("\n\n".join(tables(cells, hidden) for hidden in args.hidden))
    say(notes(cells, missing))
    if not cells:
        return
    if args.json:
        content = {"conditions": found, "missing": missing, "cells": [cell._asdict() for cell in cells]}
        write_json(args.json, content)
    if args.plot:
        plot(cells, args.plot, in_words(found))


def run(args: argparse.Namespace) -> None:
    device, began = start(_TIMEOUT_S), perf_counter()
    agree(lambda: check(args), dist.group.WORLD)
    found, cells = conditions(device), []
    say(in_words(found) + "\n")
    with torch.no_grad(), lost_peers_reported():
        ways = Ways(args.ways, args.block_size, max(args.tokens) * max(args.hidden), device, _TIMEOUT_S)
        try:
            measure_all(args, ways, device, cells)
        finally:
            if is_speaker():
                report(args, found, cells, ways.missing)
    say(f"\n{perf_counter() - began:.0f} s in all.")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(read_args())))
