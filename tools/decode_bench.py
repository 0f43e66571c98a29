"""What bench_inference.py decode measures: a step of ours, in the engine's bursts, and of mamba-ssm's by its graph.

A step takes each request's token and state to its next token, greedy; the host looks as often as the engine's does. Its
floor is the time to read the weights once, and to read and write the states, at the speed of a large copy on the same
device.
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from bench_models import AUTO, MambaSsm, Ours, draw_tokens, free_memory, recipes_of, rival_of
from bench_options import Asked, Setting, add_common, check_counts, check_pure_ssm, read_dtype
from inference_report import OURS, RIVAL
from measure import largest, markdown, tried
from megatron_steps import WAYS, MegatronSteps
from memory_speed import copy_speed
from report_files import write_json

from megatron_ssm_tp.cli.console import is_speaker, say
from megatron_ssm_tp.config import DTYPES
from megatron_ssm_tp.inference.decoder import Decoder, Emitted
from megatron_ssm_tp.inference.graphs import Graphs
from megatron_ssm_tp.inference.modes import inference_active
from megatron_ssm_tp.inference.running import Bursts
from megatron_ssm_tp.inference.sampling import SamplingNeeds
from megatron_ssm_tp.inference.slots import SlotTable
from megatron_ssm_tp.inference.small_sums import SmallSums
from megatron_ssm_tp.layers.row_parallel import set_recipes

STEPS, REPEATS = 32, 5  # of a measurement
_UNENDING = 1 << 40  # tokens
_PROMPT, _SHORT, _LONG = 16, 33, 161  # tokens: of mamba-ssm's prompt, and of two answers whose difference is timed


def add_options(parser: argparse.ArgumentParser) -> None:
    batches = [1, 8, 64, 256]
    parser.add_argument("--batches", nargs="+", type=int, default=batches, metavar="N", help="requests (1 8 64 256)")
    parser.add_argument(
        "--ssm-dtypes", nargs="+", default=["float32"], metavar="DTYPE", help=f"of states: {', '.join(DTYPES)}"
    )
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel instead of replaying graphs")
    parser.add_argument("--megatron", action="store_true", help="steps of Megatron's engine too")
    add_common(parser)


def check(args: argparse.Namespace, asked: Asked) -> None:
    """Raises UserError: anything that would fail only later."""
    check_pure_ssm(asked)
    check_counts("--batches", args.batches, "requests")
    for dtype in args.ssm_dtypes:
        read_dtype("--ssm-dtypes", dtype)


def run(setting: Setting) -> None:
    """Measure and report, what there is of it, if it is interrupted too."""
    memory = copy_speed(setting.device)
    say(f"A copy moves {memory / 1e12:.3g} TB/s, read and written: the floor's speed.")
    cells: list[DecodeCell] = []
    try:
        for name in setting.asked.models:
            DecodeBench(name, setting, memory).run(cells)
    finally:
        if cells and is_speaker():
            found = setting.conditions | {"copy": f"{memory / 1e12:.3g} TB/s"}
            report_decode(setting.args, found, cells)


class DecodeCell(NamedTuple):
    """Seconds of a step of `batch` requests, as Step has them."""

    model: str
    way: str
    batch: int
    seconds: float | None = None
    floor: float | None = None
    host: float | None = None
    idle: float | None = None
    note: str = ""


class Step(NamedTuple):
    """Seconds of a step: whole, and of its floor; of a GPU's also of the host's work for it, and of those in which the
    GPU waits for the next burst."""

    whole: float | None
    floor: float | None = None
    host: float | None = None
    idle: float | None = None


def decode_ours(ours: Ours, batch: int, ssm_dtype: torch.dtype, graphs: bool, memory: float) -> Step:
    """Medians, in the rhythm of the engine; `memory` is in bytes a second."""
    group, device = ours.groups.tp, next(ours.model.parameters()).device
    dtypes = (ours.model.config.params_dtype, ssm_dtype)
    table = SlotTable(ours.config, group.size(), batch, device, *dtypes)
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 0.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    for slot in range(batch):
        table.begin(slot, [0], sampling, _UNENDING, [])
    table.next_token[:batch] = draw_tokens(batch, 1, ours.config.vocab_size)[:, 0].to(device)
    rhythm = Bursts.on(device)
    made = Graphs(device) if graphs else None
    decoder = Decoder(ours.model, table, max(STEPS, rhythm.longest), SmallSums(ours.model, device), made)

    def burst(steps: int) -> Emitted:
        with inference_active(), torch.inference_mode():
            return decoder.burst(range(batch), steps, SamplingNeeds())

    for _ in range(2):
        burst(STEPS).wait()
    found = [_in_rhythm(burst, rhythm, device) for _ in range(REPEATS)]
    whole, host, idle = (largest(median(column), device) for column in zip(*found, strict=True))
    expected = 2 * STEPS + REPEATS * _steps(rhythm)
    if not (table.ssm[:, :batch].isfinite().all() and table.counts[:batch].eq(expected).all()):
        raise ArithmeticError("states are not finite, or tokens are missing")
    floor = floor_bytes(ours, table) / memory
    return Step(whole, floor, host, idle) if device.type == "cuda" else Step(whole, floor)  # a CPU is the host


def _in_rhythm(burst: Callable[[int], Emitted], rhythm: Bursts, device: torch.device) -> tuple[float, float, float]:
    """Seconds of a step: whole, of the host's work for it, and of those in which the GPU waits for the next burst; so
    many bursts being under way when one is looked at."""
    under_way: deque[Emitted] = deque()
    marks, host, began = [], 0.0, perf_counter()
    for _ in range(0, STEPS, rhythm.longest):
        launched = perf_counter()
        marks.append(_mark(device))
        under_way.append(burst(rhythm.longest))
        marks.append(_mark(device))
        host += perf_counter() - launched
        while len(under_way) > rhythm.ahead:
            under_way.popleft().wait()
    while under_way:
        under_way.popleft().wait()
    whole = perf_counter() - began
    gaps = zip(marks[1:-1:2], marks[2::2], strict=True) if device.type == "cuda" else ()
    idle = sum(end.elapsed_time(begin) for end, begin in gaps) * 1e-3
    return tuple(seconds / _steps(rhythm) for seconds in (whole, host, idle))


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """Here on the GPU's stream."""
    if device.type != "cuda":
        return None
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def _steps(rhythm: Bursts) -> int:
    """STEPS in whole bursts."""
    return -(-STEPS // rhythm.longest) * rhythm.longest


def floor_bytes(ours: Ours, table: SlotTable) -> int:
    """Of the weights that a step reads, and of the states of the table's slots, which it reads and writes."""
    tied = ours.model.share_embeddings_and_output_weights
    embedding = ours.model.embedding.word_embeddings.weight
    weights = sum(p.nbytes for p in ours.model.parameters()) - (0 if tied else embedding.nbytes)
    states = (table.conv.nbytes + table.ssm.nbytes) * table.slots // (table.slots + 1)
    return weights + 2 * states


def decode_theirs(theirs: MambaSsm, batch: int) -> float:
    """Seconds of a step of mamba-ssm's generate with its CUDA graph, greedy; what a prompt costs is taken off."""
    tokens = draw_tokens(batch, _PROMPT, theirs.vocab_size).to(theirs.device)

    def taken(count: int) -> float:
        def generate() -> object:
            return theirs.model.generate(input_ids=tokens, max_length=_PROMPT + count, cg=True, top_k=1)

        return _timed(generate)

    return (taken(_LONG) - taken(_SHORT)) / (_LONG - _SHORT)


def _timed(run: Callable[[], object]) -> float:
    """The median of three, after one that is not counted."""
    found = []
    for _ in range(4):
        torch.cuda.synchronize()
        begin = perf_counter()
        with torch.inference_mode():
            run()
        torch.cuda.synchronize()
        found.append(perf_counter() - begin)
    return sorted(found[1:])[1]


def decode_table(cells: list[DecodeCell]) -> str:
    """Markdown, a row a way and batch; ratios to mamba-ssm's step of the same model and batch."""
    rows = []
    for cell in cells:
        if cell.seconds is None:
            continue
        rival = next((c.seconds for c in cells if (c.model, c.batch, c.way) == (cell.model, cell.batch, RIVAL)), None)
        values = [(cell.seconds * 1e3, ".3f"), (cell.batch / cell.seconds, ".0f")]
        values += [(cell.floor / cell.seconds * 100 if cell.floor else None, ".0f")]
        values += [(cell.host / cell.seconds * 100 if cell.host else None, ".1f")]
        values += [(cell.idle / cell.seconds * 100 if cell.idle is not None else None, ".2f")]
        values += [(rival / cell.seconds if rival else None, ".2f")]
        shown = [format(value, form) if value is not None else "-" for value, form in values]
        rows.append([cell.model, cell.way, str(cell.batch), *shown])
    header = ["model", "way", "batch", "ms a step", "tokens/s", "% of the floor", "host, % of a step", "GPU idle, %"]
    header.append("times as fast")
    return markdown(header, rows)


class DecodeBench:
    """All that is measured of one model's steps."""

    def __init__(self, name: str, setting: Setting, memory: float) -> None:
        self.memory = memory
        self.name, self.setting, self.args, self.device = name, setting, setting.args, setting.device
        self.config, self.whole = setting.asked.models[name]
        self.ssm_dtypes = [getattr(torch, dtype) for dtype in setting.args.ssm_dtypes]

    def run(self, cells: list[DecodeCell]) -> None:
        ours = self.setting.model(self.name)
        layers = len(self.config.layers)
        say(f"{self.name}: {layers} of {self.whole} layers, {ours.parameters_here / 1e9:.3g} B parameters a rank")
        for recipe, ssm_dtype, batch in product(self.args.recipes, self.ssm_dtypes, self.args.batches):
            set_recipes(ours.model, recipes_of(recipe))
            words = [OURS, f"{str(ssm_dtype).removeprefix('torch.')} states", *([recipe] if recipe != AUTO else [])]
            graphs = self.device.type == "cuda" and not self.args.no_graphs
            measured = partial(decode_ours, ours, batch, ssm_dtype, graphs, self.memory)
            self._add(cells, ", ".join(words), batch, measured)
            free_memory()
        del ours
        free_memory()
        if self.args.megatron:
            self._megatron(cells)
        self._rival(cells)

    def _megatron(self, cells: list[DecodeCell]) -> None:
        """A step of Megatron's engine, without graphs first: those that it has made keep their memory."""
        for way, graphs in WAYS.items():
            if graphs and self.device.type != "cuda":
                say(f"{way}: not measured, there is no GPU")
                continue
            steps = MegatronSteps(self.name, self.setting, self.args.batches, graphs)
            for batch in self.args.batches:
                self._add(cells, way, batch, lambda batch=batch, steps=steps: Step(steps.seconds(batch)))
            steps.close()
            del steps
            free_memory()

    def _rival(self, cells: list[DecodeCell]) -> None:
        theirs, missing = None, "its graph needs a GPU"
        if self.device.type == "cuda":
            theirs, missing = rival_of(self.config, self.setting.groups, self.device, self.setting.asked.dtype)
        if theirs is None:
            say(f"{RIVAL} is not measured: {missing}")
            return
        for batch in self.args.batches:
            self._add(cells, RIVAL, batch, lambda batch=batch: Step(decode_theirs(theirs, batch)))

    def _add(self, cells: list[DecodeCell], way: str, batch: int, measure: Callable[[], Step]) -> None:
        found, note = tried(measure, self.device)
        cells.append(DecodeCell(self.name, way, batch, *(found or Step(None)), note))
        if is_speaker():  # a run that ends early has shown what it had measured
            said = note if found is None else f"{found.whole * 1e3:.3f} ms"
            print(f"{self.name}, {way}, {batch}: {said}", file=sys.stderr, flush=True)


def report_decode(args: argparse.Namespace, found: dict[str, str], cells: list[DecodeCell]) -> None:
    say(f"\n{decode_table(cells)}\n")
    for cell in (cell for cell in cells if cell.note):
        say(f"Not measured: {cell.model}, {cell.way}, {cell.batch}: {cell.note}")
    if args.json:
        content = {"conditions": found, "layers": args.layers, "cells": [cell._asdict() for cell in cells]}
        write_json(args.json, content)
