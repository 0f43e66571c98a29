"""Measure how the symmetric backend's kernels are best launched, and write the table that it chooses from.

    torchrun --nproc-per-node 2 tools/tune_allreduce.py

For each recipe and number of values (tokens x hidden, bfloat16) every launch that could be the best is timed in a CUDA
graph; the fastest, by the slowest rank, is kept. The rows of other numbers of ranks that the table has stay as they
are. An entry serves sizes up to the geometric mean of its own and the next.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import sqrt
from pathlib import Path

import torch
import torch.distributed as dist
from measure import captured, conditions, in_words, prepare_symmetric, same_bits, seconds, start

from megatron_ssm_tp import UserError
from megatron_ssm_tp.cli.console import is_speaker
from megatron_ssm_tp.comm import symmetric
from megatron_ssm_tp.comm.recipes import RECIPE_NAMES, AllReduceRecipe, recipe_by_name
from megatron_ssm_tp.comm.tuning import TABLE, Launch, Row, table, write

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
    say: Callable[[str], None],
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
        say(f"{taken * 1e6:9.1f} us  {launch}")
        found.append((taken, launch))
    taken, launch = min(found, key=lambda pair: pair[0])
    return launch, taken


def tune(
    recipe: AllReduceRecipe, fused: bool, tokens: list[int], hidden: int, device: torch.device, say: Callable
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

        launch, taken = best(run, expected, launches, device, say)
        say(f"{recipe.name}{' fused' if fused else ''} {rows} x {hidden}: {taken * 1e6:.1f} us by {launch}\n")
        found.append((x.numel(), launch))
    limits = [int(sqrt(a * b)) for (a, _), (b, _) in pairwise(found)] + [found[-1][0]]
    return [Row(ranks, recipe.name, fused, limit, launch) for limit, (_, launch) in zip(limits, found, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPE_NAMES[1:]), choices=RECIPE_NAMES[1:])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512, 2048, 8192, 32768])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--only", choices=("reduce", "fused"), help="leave the rows of the other kind as they are")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--verbose", action="store_true", help="print every launch that is timed")
    arguments = parser.parse_args(argv)
    device = start(timeout_s=60)
    missing = prepare_symmetric([dist.group.WORLD], device, timeout_s=20)
    if missing:
        raise UserError("backend", "symmetric", missing, "GPUs of one node")

    def say(line: str) -> None:
        if is_speaker() and (arguments.verbose or line.endswith("\n")):
            print(line.rstrip(), flush=True)

    say(in_words(conditions(device)) + "\n")
    kinds = [kind == "fused" for kind in ("reduce", "fused") if arguments.only in (None, kind)]
    rows: list[Row] = []
    for name in arguments.recipes:
        for fused in kinds:
            rows += tune(recipe_by_name(name), fused, sorted(arguments.tokens), arguments.hidden, device, say)
            if is_speaker():
                new = {(row.ranks, row.recipe, row.fused) for row in rows}
                old = [row for row in table(arguments.table) if (row.ranks, row.recipe, row.fused) not in new]
                write(arguments.table, old + rows, conditions(device))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
