"""How fast whole models run: this package's, and mamba-ssm's of the same shape where it is installed, in one run.

    python tools/bench_inference.py prefill                                                   # one GPU
    torchrun --standalone --nproc-per-node 2 tools/bench_inference.py prefill --recipes none int8

Weights are random, made on the device. prefill: a forward pass over prompts packed end to end, with the state cache
that the engine uses, as the engine calls it; logits of each prompt's last token alone. A pass begins on an idle GPU and
is waited for; times are medians of 5 to 50 passes, of the slowest rank.

With --layers the first layers of a model are run, and the time of a pass is that of what is around the layers and, for
each layer of the whole model, the mean time of those that ran.
"""

import argparse
import gc
import json
import os
import sys
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from bench_models import MODELS, MambaSsm, Ours, Pass, differences, free_memory, read_model, recipes_of, rival_of
from decode_bench import DecodeBench, report_decode
from inference_report import OURS, RIVAL, Cell, report, with_ratios
from layer_parts import OUTSIDE, seconds_by_part
from measure import (
    NO_MULTICAST,
    check_plot,
    check_writable,
    conditions,
    in_words,
    largest,
    pass_seconds,
    tried,
    version_of,
)
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ssm_tp.cli.console import Parser, guarded, is_speaker, say
from megatron_ssm_tp.comm.recipes import RECIPE_NAMES
from megatron_ssm_tp.config import DTYPES, ModelConfig
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.inference.distributed import join
from megatron_ssm_tp.layers.row_parallel import set_recipes
from megatron_ssm_tp.ranks import agree, lost_peers_reported

PASSES = ("whole", "halves")
_PROFILED = 2  # passes


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    prefill = commands.add_parser("prefill", help="prompts, a pass each")
    prefill.add_argument("--shapes", nargs="+", default=["1x8192", "8x2048"], metavar="PROMPTSxTOKENS")
    passes = "whole, or in two halves of the tokens of which one's sums travel while the other's products run"
    prefill.add_argument(
        "--passes", nargs="+", default=["whole"], metavar="PASSES", help=f"{', '.join(PASSES)}: {passes}"
    )
    prefill.add_argument("--plot", metavar="FILE", help="tokens a second, as a picture")
    prefill.add_argument("--parts", action="store_true", help="a layer's time by part, from the profiler")
    _add_common(prefill)
    decode = commands.add_parser("decode", help="steps of decoding, a token a request each")
    decode.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], metavar="N", help="requests (1 8 64)")
    decode.add_argument(
        "--ssm-dtypes", nargs="+", default=["float32"], metavar="DTYPE", help=f"of states: {', '.join(DTYPES)}"
    )
    decode.add_argument("--no-graphs", action="store_true", help="launch every kernel instead of replaying graphs")
    _add_common(decode)
    return made.parse_args(argv)


def _add_common(parser: argparse.ArgumentParser) -> None:
    named = f"{', '.join(MODELS)}, or the path of a config.json"
    parser.add_argument("--models", nargs="+", default=["falcon-mamba-7b"], metavar="MODEL", help=named)
    parser.add_argument(
        "--layers", type=int, metavar="N", help="run the first N layers; passes are scaled, steps are not"
    )
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["none"],
        metavar="RECIPE",
        help=f"{', '.join(RECIPE_NAMES)}, or a YAML file (docs/recipes.md)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")


class Asked(NamedTuple):
    """What the options ask for, checked."""

    models: dict[str, tuple[ModelConfig, int]]
    shapes: list[tuple[int, int]]  # of prefill
    dtype: torch.dtype
    ssm_dtypes: list[torch.dtype]  # of decode


def check(args: argparse.Namespace, ranks: int) -> Asked:
    """Raises UserError: anything that would fail only later."""
    if args.dtype not in DTYPES:
        raise UserError("--dtype", args.dtype, "cannot be run", ", ".join(DTYPES))
    for recipe in args.recipes:
        recipes_of(recipe)
        if recipe != "none" and ranks == 1:
            raise UserError("--recipes", recipe, "one rank reduces nothing", "none, or torchrun --nproc-per-node 2")
    for passes in getattr(args, "passes", ()):
        if passes not in PASSES:
            raise UserError("--passes", passes, "is no way to make a pass", ", ".join(PASSES))
    check_writable("--json", args.json)
    check_plot(getattr(args, "plot", None))
    models = {_title(name): read_model(_raw(name), args.layers) for name in args.models}
    for name, (model, _) in models.items():
        if "halves" in getattr(args, "passes", ()) and not model.is_pure_ssm:
            raise UserError("--passes", "halves", f"{name} has other layers than SSMs", "whole")
        if args.command == "decode" and not model.is_pure_ssm:
            raise UserError("--models", name, "has other layers than SSMs, which Megatron's engine decodes", "others")
    shapes = [_shape(text) for text in getattr(args, "shapes", ())]
    for dtype in getattr(args, "ssm_dtypes", ()):
        if dtype not in DTYPES:
            raise UserError("--ssm-dtypes", dtype, "cannot be run", ", ".join(DTYPES))
    for batch in getattr(args, "batches", ()):
        if batch < 1:
            raise UserError("--batches", batch, "is no number of requests", "an integer from 1")
    ssm_dtypes = [getattr(torch, dtype) for dtype in getattr(args, "ssm_dtypes", ())]
    return Asked(models, shapes, getattr(torch, args.dtype), ssm_dtypes)


def _title(name: str) -> str:
    """What a model is called: a config.json by its folder."""
    return name if name in MODELS else Path(name).resolve().parent.name


def _raw(name: str) -> dict:
    if name in MODELS:
        return MODELS[name]
    try:
        return json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        legal = f"{', '.join(MODELS)}, or the path of a config.json"
        raise UserError("--models", name, f"is no shape that is known, nor a file ({error})", legal) from None


def _shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit() and int(batch) and int(length)):
        raise UserError("--shapes", text, "is no batch of prompts", "prompts x tokens, such as 8x2048")
    return int(batch), int(length)


# --- Measuring ------------------------------------------------------------------------------------------------------


class Bench:
    """All that is measured of one model, appended to `cells`, so that what was measured before an error is there."""

    def __init__(
        self, name: str, asked: Asked, args: argparse.Namespace, groups: ProcessGroupCollection, device: torch.device
    ) -> None:
        self.name, self.asked, self.args, self.groups, self.device = name, asked, args, groups, device
        self.config, self.whole = asked.models[name]
        self.notes: list[str] = []

    def run(self, cells: list[Cell]) -> None:
        free_memory()
        ours = Ours(
            self.config, self.groups, self.device, self.asked.dtype, max(length for _, length in self.asked.shapes)
        )
        here = ours.parameters_here
        self.notes.append(f"{len(self.config.layers)} of {self.whole} layers, {here / 1e9:.3g} B parameters a rank")
        for shape in self.asked.shapes:
            cells += self._shape(ours, shape)
        del ours
        cells += self._rival()
        free_memory()

    def _shape(self, ours: Ours, shape: tuple[int, int]) -> list[Cell]:
        blank, found = Cell(self.name, OURS, *shape), []
        free_memory()
        passing, note = tried(lambda: ours.prefill(*shape), self.device)
        if passing is None:
            return [blank._replace(note=note)]
        for recipe, passes in product(self.args.recipes, self.args.passes):
            set_recipes(ours.model, recipes_of(recipe))
            ours.model.decoder.overlap_from = 2 if passes == "halves" else None
            chosen = [word for word in (recipe, passes) if word not in ("none", "whole")]
            cell = self._timed(ours, passing, blank._replace(way=", ".join([blank.way, *chosen])))
            if self.args.parts and cell.ms:
                cell = cell._replace(parts=self._parts(ours, passing))
            found.append(cell)
        set_recipes(ours.model, None)
        return found

    def _rival(self) -> list[Cell]:
        theirs, missing = rival_of(self.config, self.groups, self.device, self.asked.dtype)
        if theirs is None:
            self.notes.append(f"{RIVAL} is not measured: {missing}")
            return []
        self.notes.append(f"{RIVAL} {version_of('mamba-ssm')}: " + "; ".join(differences(self.config)))
        found = []
        for shape in self.asked.shapes:
            found.append(self._timed(theirs, theirs.prefill(*shape), Cell(self.name, RIVAL, *shape)))
            free_memory()
        return found

    def _timed(self, model: Ours | MambaSsm, passing: Pass, cell: Cell) -> Cell:
        """The cell with its times and memory; what fails is a note."""
        on_gpu = self.device.type == "cuda"

        def measured() -> tuple[float, float, float, float]:
            if not passing.run().isfinite().all():
                raise ArithmeticError("logits are not finite")
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            whole, host = pass_seconds(passing.run, self.device, passing.refresh)
            peak = largest(torch.cuda.max_memory_allocated() if on_gpu else 0.0, self.device)
            with model.without_layers():
                around = pass_seconds(passing.run, self.device, passing.refresh).whole
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


def run(args: argparse.Namespace) -> None:
    os.environ.update(NO_MULTICAST)
    began = perf_counter()
    device, groups = join(None)
    gc.freeze()  # what was imported is not collected through
    asked = agree(lambda: check(args, groups.tp.size()), dist.group.WORLD)
    found, cells, notes = conditions(device), [], {}
    say(in_words(found) + "\n")
    try:
        with lost_peers_reported():
            for name in asked.models:
                if args.command == "decode":
                    DecodeBench(name, asked.models[name], asked.dtype, asked.ssm_dtypes, args, groups, device).run(
                        cells
                    )
                    continue
                bench = Bench(name, asked, args, groups, device)
                notes[name] = bench.notes
                bench.run(cells)
    finally:
        if is_speaker() and args.command == "decode":
            report_decode(args, found, cells)
        elif is_speaker():
            report(args, found, with_ratios(cells), notes)
    say(f"{perf_counter() - began:.0f} s in all.")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(read_args())))
