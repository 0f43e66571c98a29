"""What bench_inference.py prefill measures: a forward pass over prompts packed end to end.

It is made as Megatron's engine makes it, with its state cache and every kernel launched, or as our own does (--passes
engine). Logits are of each prompt's last token alone. A pass begins on an idle GPU and is waited for; times are medians
of 5 to 50 passes, of the slowest rank. With --layers the time of a pass is that of what is around the layers and, for
each layer of the whole model, the mean time of those that ran.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from math import inf

import torch
from bench_models import AUTO, MambaSsm, Ours, Pass, differences, free_memory, recipes_of, rival_of
from bench_options import Asked, Setting, add_common, check_pure_ssm
from inference_report import OURS, RIVAL, Cell, report, with_ratios
from layer_parts import OUTSIDE, seconds_by_part
from measure import largest, pass_seconds, tried, version_of
from options import read_shape

from megatron_ssm_tp.cli.console import is_speaker
from megatron_ssm_tp.config import Mamba1Config
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.layers.overlap import HALVES, X_PROJ, set_overlap
from megatron_ssm_tp.layers.row_parallel import set_recipes

WHOLE, ENGINE = "whole", "engine"
PASSES = (WHOLE, HALVES, X_PROJ, ENGINE)
_PROFILED = 2  # passes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["1x8192", "8x2048"], metavar="PROMPTSxTOKENS")
    passes = "whole, in two halves of the tokens of which one's sums travel while the other's products run, with"
    parser.add_argument(
        "--passes",
        nargs="+",
        default=[WHOLE],
        metavar="PASSES",
        help=f"{', '.join(PASSES)}: {passes} x_proj's sums travelling while z is computed, or as our engine makes it",
    )
    parser.add_argument("--plot", metavar="FILE", help="tokens a second, as a picture")
    parser.add_argument("--parts", action="store_true", help="a layer's time by part, from the profiler")
    parser.add_argument("--seconds", type=float, metavar="S", help="that a figure is measured, of 5 passes or more (3)")
    add_common(parser)


def check(args: argparse.Namespace, asked: Asked) -> None:
    """Raises UserError: anything that would fail only later."""
    for text in args.shapes:
        read_shape(text)
    for passes in args.passes:
        if passes not in PASSES:
            raise UserError("--passes", passes, "is no way to make a pass", ", ".join(PASSES))
    check_seconds(args)
    if ENGINE in args.passes and args.parts:
        problem = "may be a CUDA graph, whose parts are not told apart"
        raise UserError("--passes", ENGINE, problem, f"{', '.join(PASSES[:-1])}; or no --parts")
    if {HALVES, ENGINE} & set(args.passes):
        check_pure_ssm(asked)
    for title, (config, _) in asked.models.items():
        if X_PROJ in args.passes and not isinstance(config.mixer, Mamba1Config):
            raise UserError("--passes", X_PROJ, f"{title} has no x_proj", f"{WHOLE}, {HALVES}")


def check_seconds(args: argparse.Namespace) -> None:
    """Raises UserError: no time."""
    if args.seconds is not None and not 0 < args.seconds < inf:
        raise UserError("--seconds", args.seconds, "is no time to measure in", "numbers above 0")


def run(setting: Setting) -> None:
    """Measure and report, what there is of it, if it is interrupted too."""
    cells: list[Cell] = []
    notes: dict[str, list[str]] = {}
    try:
        for name in setting.asked.models:
            bench = PrefillBench(name, setting)
            notes[name] = bench.notes
            bench.run(cells)
    finally:
        if cells and is_speaker():
            report(setting.args, setting.conditions, with_ratios(cells), notes)


class PrefillBench:
    """All that is measured of one model, appended to `cells`, so that what was measured before an error is there."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting, self.args, self.device = name, setting, setting.args, setting.device
        self.shapes = [read_shape(text) for text in setting.args.shapes]
        self.config, self.whole = setting.asked.models[name]
        self.notes: list[str] = []

    def run(self, cells: list[Cell]) -> None:
        ours = self.setting.model(self.name, max(length for _, length in self.shapes))
        here = ours.parameters_here
        self.notes.append(f"{len(self.config.layers)} of {self.whole} layers, {here / 1e9:.3g} B parameters a rank")
        for shape in self.shapes:
            cells += self._shape(ours, shape)
        del ours
        cells += self._rival()
        free_memory()

    def _shape(self, ours: Ours, shape: tuple[int, int]) -> list[Cell]:
        blank, found = Cell(self.name, OURS, *shape), []
        free_memory()
        for recipe, passes in product(self.args.recipes, self.args.passes):
            set_recipes(ours.model, recipes_of(recipe))
            overlap, tokens = (passes, 2) if passes in (HALVES, X_PROJ) else (HALVES, None)
            set_overlap(ours.model, overlap, tokens)
            chosen = [word for word in (recipe, passes) if word not in (AUTO, WHOLE)]
            make = partial(ours.engine_pass if passes == ENGINE else ours.prefill, *shape)
            cell = self._timed(ours, make, blank._replace(way=", ".join([blank.way, *chosen])))
            if self.args.parts and cell.ms:
                cell = cell._replace(parts=self._parts(ours, make()))
            found.append(cell)
        set_recipes(ours.model, None)
        set_overlap(ours.model, HALVES, None)
        return found

    def _rival(self) -> list[Cell]:
        theirs, missing = rival_of(self.config, self.setting.groups, self.device, self.setting.asked.dtype)
        if theirs is None:
            self.notes.append(f"{RIVAL} is not measured: {missing}")
            return []
        self.notes.append(f"{RIVAL} {version_of('mamba-ssm')}: " + "; ".join(differences(self.config)))
        found = []
        for shape in self.shapes:
            found.append(self._timed(theirs, partial(theirs.prefill, *shape), Cell(self.name, RIVAL, *shape)))
            free_memory()
        return found

    def _timed(self, model: Ours | MambaSsm, make: Callable[[], Pass], cell: Cell) -> Cell:
        """The cell with its times and memory; what fails is a note."""
        on_gpu = self.device.type == "cuda"

        def measured() -> tuple[float, float, float, float]:
            passing = make()
            if not passing.run().isfinite().all():
                raise ArithmeticError("logits are not finite")
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            whole, host = pass_seconds(passing.run, self.device, passing.refresh, self.args.seconds)
            peak = largest(torch.cuda.max_memory_allocated() if on_gpu else 0.0, self.device)
            with model.without_layers():
                around = pass_seconds(passing.run, self.device, passing.refresh, self.args.seconds).whole
            return whole, host, peak, around

        result, note = tried(measured, self.device)
        if is_speaker():  # a run that ends early has shown what it had measured
            found = note if result is None else f"{result[0] * 1e3:.2f} ms"
            print(f"{cell.model}, {cell.way}, {cell.batch}x{cell.length}: {found}", file=sys.stderr, flush=True)
        if result is None:
            return cell._replace(note=note)
        whole, host, peak, around = result
        layer = (whole - around) / len(self.config.layers)
        return cell._replace(
            ms=(around + layer * self.whole) * 1e3,
            layer_ms=layer * 1e3,
            host_ms=host * 1e3,
            peak_gb=peak / 1e9 if on_gpu else None,
        )

    def _parts(self, ours: Ours, passing: Pass) -> dict[str, float]:
        seconds = seconds_by_part(ours.model, passing.run, self.device, _PROFILED)
        layers = len(self.config.layers)
        return {part: taken * 1e3 / (1 if part == OUTSIDE else layers) for part, taken in seconds.items()}
