"""Measure how the symmetric backend's kernels are best launched, and write the table that it chooses from.

    torchrun --standalone --nproc-per-node 2 tools/tune_allreduce.py
    torchrun --standalone --nproc-per-node 2 tools/tune_allreduce.py --recipes int8 --tokens 1 32 --table mine.json

Needs two or more GPUs of one node with peer access, one for each rank. For each recipe and number of values (tokens x
hidden, bfloat16) every launch that could be the best is timed in a CUDA graph; the fastest, by the slowest rank, is
kept. The rows of other numbers of ranks that the table has stay as they are. An entry serves sizes up to the geometric
mean of its own and the next.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import sqrt
from pathlib import Path

import torch
import torch.distributed as dist
from measure import (
    captured,
    conditions,
    in_words,
    prepare_symmetric,
    same_bits,
    seconds,
    start,
)

from megatron_ssm_tp import UserError
from megatron_ssm_tp.cli.console import Parser, guarded, is_speaker, say
from megatron_ssm_tp.cli.files import check_writable
from megatron_ssm_tp.comm import symmetric
from megatron_ssm_tp.comm.recipes import RECIPE_NAMES, AllReduceRecipe, recipe_by_name
from megatron_ssm_tp.comm.tuning import TABLE, Launch, Row, table, write
from megatron_ssm_tp.ranks import agree, lost_peers_reported

FORMATS = RECIPE_NAMES[1:]
TOKENS = [1, 8, 32, 128, 512, 2048, 8192, 32768]
BLOCK_SIZE, MOST_HIDDEN = 128, 16384  # of the recipes that are timed; a row's values that a fused kernel holds
# Bytes sent, beyond or below which a way was never the best.
WORDS_AT_MOST = 1 << 20
TOGETHER_AT_LEAST = 1 << 17
TOGETHER_AT_MOST = 1 << 24
SPLIT_AT_LEAST = 1 << 22
# Tile, warps, registers and programs of a role on each multiprocessor: as many as run at a time, or a few less.
SPLITS = ((2048, 4, 0, (2, 4)), (2048, 4, 80, (2, 3)), (2048, 4, 64, (3, 4)), (2048, 8, 64, (2,)), (4096, 8, 64, (2,)))


def candidates(ranks: int, recipe: AllReduceRecipe, values: int) -> Iterator[Launch]:
    """Launches that could be the best for so many values."""
    sent = recipe.bytes_of(values) * (ranks - 1)
    if sent <= WORDS_AT_MOST:
        for tile, warps in ((256, 2), (512, 1), (512, 2), (1024, 4)):
            yield Launch("words", tile, warps)
    if TOGETHER_AT_LEAST <= sent <= TOGETHER_AT_MOST:
        for tile, warps in ((2048, 8), (4096, 8), (4096, 16)):
            yield from _by_programs(Launch("one-shot", tile, warps), values // tile, (2, 4))
    if sent >= SPLIT_AT_LEAST:
        for way in ("split",) if ranks == 2 else ("split", "two-shot"):
            for tile, warps, registers, programs in SPLITS:
                for chunk in (4, 8):
                    launch = Launch(way, tile, warps, chunk=chunk, registers=registers)
                    yield from _by_programs(launch, values // (tile * chunk), programs)


def fused_candidates(ranks: int, recipe: AllReduceRecipe, rows: int, columns: int) -> Iterator[Launch]:
    sent = recipe.bytes_of(rows * columns) * (ranks - 1)
    for warps, registers in ((8, 0), (16, 0), (8, 64), (16, 64)):
        if sent <= WORDS_AT_MOST:
            yield Launch("words", columns, warps, registers=registers)
        if TOGETHER_AT_LEAST <= sent <= TOGETHER_AT_MOST:
            yield from _by_programs(Launch("one-shot", columns, warps, registers=registers), rows, (2, 4))
        if sent >= SPLIT_AT_LEAST:
            for way in ("split",) if ranks == 2 else ("split", "two-shot"):
                for chunk in (2, 4, 8):
                    launch = Launch(way, columns, warps, chunk=chunk, registers=registers)
                    yield from _by_programs(launch, rows // chunk, (1, 2))


def _by_programs(launch: Launch, tiles: int, a_processor: tuple[int, ...]) -> Iterator[Launch]:
    """All tiles at once, or as many programs on each multiprocessor."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    if tiles <= 2 * processors:
        yield launch
    for programs in a_processor:
        if tiles > programs * processors and programs * launch.warps <= 48:
            yield replace(launch, programs=programs * processors)


def best(
    run: Callable[[Launch], torch.Tensor],
    expected: torch.Tensor,
    launches: list[Launch],
    device: torch.device,
    tell: Callable[[str], None],
) -> tuple[Launch, float]:
    """The fastest launch and its seconds; raises RuntimeError where a result is wrong."""
    found: list[tuple[float, Launch]] = []
    calls = 10 if expected.numel() <= 1 << 23 else 2
    for launch in launches:
        out = run(launch)
        error = ((out.float() - expected).norm() / expected.norm()).item()
        if not error < 0.2 or not same_bits(out):
            raise RuntimeError(f"{launch}: wrong by {error:.2g}, or ranks differ")
        graph, _ = captured(lambda launch=launch: [run(launch) for _ in range(calls)])
        taken = seconds(graph.replay, device) / calls
        tell(f"{taken * 1e6:9.1f} us  {launch}")
        found.append((taken, launch))
    taken, launch = min(found, key=lambda pair: pair[0])
    return launch, taken


def tune(
    recipe: AllReduceRecipe, fused: bool, tokens: list[int], hidden: int, device: torch.device, tell: Callable
) -> list[Row]:
    """The table's rows for one recipe."""
    group, ranks = dist.group.WORLD, dist.get_world_size()
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    found: list[tuple[int, Launch]] = []
    for rows in tokens:
        x = torch.randn(rows, hidden, generator=generator, device=device).bfloat16()
        expected = x.float()
        dist.all_reduce(expected)
        if fused:
            residual, weight = torch.zeros_like(x), torch.ones(hidden, dtype=x.dtype, device=device)
            launches = list(fused_candidates(ranks, recipe, rows, hidden))

            def run(launch: Launch, x=x, residual=residual, weight=weight) -> torch.Tensor:
                return symmetric.all_reduce_add_norm(x, residual, weight, 1e-5, group, recipe, launch)[0]
        else:
            launches = list(candidates(ranks, recipe, x.numel()))

            def run(launch: Launch, x=x) -> torch.Tensor:
                return symmetric.all_reduce(x, group, recipe, launch=launch)

        launch, taken = best(run, expected, launches, device, tell)
        tell(f"{recipe.name}{' fused' if fused else ''} {rows} x {hidden}: {taken * 1e6:.1f} us by {launch}\n")
        found.append((x.numel(), launch))
    limits = [int(sqrt(a * b)) for (a, _), (b, _) in pairwise(found)] + [found[-1][0]]
    return [Row(ranks, recipe.name, fused, limit, launch) for limit, (_, launch) in zip(limits, found, strict=True)]


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--recipes", nargs="+", default=list(FORMATS), metavar="NAME", help=f"default: all of {', '.join(FORMATS)}"
    )
    made.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N", help="sizes (1 8 32 .. 32768)")
    made.add_argument("--hidden", type=int, default=4096, metavar="N", help="values a token (4096)")
    made.add_argument(
        "--only",
        choices=("reduce", "fused"),
        help="the sum alone, or the sum with residual and norm; leave the rows of the other kind as they are",
    )
    made.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="default: the one that is installed")
    made.add_argument("--verbose", action="store_true", help="print every launch that is timed")
    return made.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises UserError: an option's value."""
    for name in args.recipes:
        if name not in FORMATS:
            raise UserError("--recipes", name, "unknown format", ", ".join(FORMATS))
    for tokens in args.tokens:
        if tokens < 1:
            raise UserError("--tokens", tokens, "is too few", "integers from 1")
    if args.hidden % BLOCK_SIZE or not 0 < args.hidden <= MOST_HIDDEN:
        legal = f"multiples of {BLOCK_SIZE} to {MOST_HIDDEN}"
        raise UserError("--hidden", args.hidden, "no row of whole blocks that a program can hold", legal)
    check_writable("--table", str(args.table))


def run(args: argparse.Namespace) -> None:
    device = start(timeout_s=60)
    agree(lambda: check(args), dist.group.WORLD)
    missing = prepare_symmetric([dist.group.WORLD], device, timeout_s=20)
    if missing:
        raise UserError("backend", "symmetric", missing, "GPUs of one node with peer access: only they are tuned")

    def tell(line: str) -> None:
        if args.verbose or line.endswith("\n"):
            say(line.rstrip())

    tell(in_words(conditions(device)) + "\n")
    kinds = [kind == "fused" for kind in ("reduce", "fused") if args.only in (None, kind)]
    rows: list[Row] = []
    with lost_peers_reported():
        for name in args.recipes:
            for fused in kinds:
                rows += tune(recipe_by_name(name), fused, sorted(args.tokens), args.hidden, device, tell)
                if is_speaker():
                    new = {(row.ranks, row.recipe, row.fused) for row in rows}
                    old = [row for row in table(args.table) if (row.ranks, row.recipe, row.fused) not in new]
                    write(args.table, old + rows, conditions(device))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(read_args())))
