"""What the subcommands of bench_inference.py have in common: their options, checked, and errors of one line."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_models import AUTO, Ours, free_memory, recipes_of
from bench_shapes import MODELS, read_model
from megatron.core.process_groups_config import ProcessGroupCollection
from options import check_ranks
from report_files import check_reports

from megatron_ssm_tp.comm.recipes import RECIPE_NAMES
from megatron_ssm_tp.config import DTYPES, ModelConfig
from megatron_ssm_tp.errors import UserError, renamed

_CONFIG = f"{', '.join(MODELS)}, or the path of a config.json"


@dataclass(frozen=True)
class Asked:
    """What the options of any subcommand ask for, checked.

    Args:
        models: by their titles, each with the number of its layers when it is whole.
    """

    models: dict[str, tuple[ModelConfig, int]]
    dtype: torch.dtype


@dataclass(frozen=True)
class Setting:
    """What a subcommand runs in: its options, as they are and checked, the ranks, this rank's device, and what is said
    of the machine."""

    args: argparse.Namespace
    asked: Asked
    groups: ProcessGroupCollection
    device: torch.device
    conditions: dict[str, str]

    def model(self, name: str, longest: int = 1) -> Ours:
        """This package's model of that title, for prompts of so many tokens where Megatron's context reads them."""
        free_memory()
        return Ours(self.asked.models[name][0], self.groups, self.device, self.asked.dtype, longest)


def add_common(parser: argparse.ArgumentParser, models: Sequence[str] = ("falcon-mamba-7b",)) -> None:
    parser.add_argument("--models", nargs="+", default=list(models), metavar="MODEL", help=_CONFIG)
    parser.add_argument("--layers", type=int, metavar="N", help="run the first N layers; prefill's passes are scaled")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=[AUTO],
        metavar="RECIPE",
        help=f"of sums between ranks: {AUTO} (as the engine chooses), {', '.join(RECIPE_NAMES)}, or a YAML file "
        "(docs/recipes.md)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")


def read_common(args: argparse.Namespace, ranks: int) -> Asked:
    """Raises UserError: anything that would fail only later."""
    dtype = read_dtype("--dtype", args.dtype)
    for recipe in args.recipes:
        with renamed(lambda field: "--recipes" if field == "recipe" else field):
            recipes_of(recipe)
        if recipe != AUTO and ranks == 1:
            raise UserError("--recipes", recipe, "one rank reduces nothing", f"{AUTO}, or torchrun --nproc-per-node 2")
    check_reports(args.json, getattr(args, "plot", None))
    models = {}
    for name, title in zip(args.models, titles(args.models), strict=True):
        models[title] = read_model(_raw(name), args.layers)
        check_ranks(models[title][0], ranks)
    return Asked(models, dtype)


def read_dtype(option: str, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(option, name, "cannot be run", ", ".join(DTYPES))
    return getattr(torch, name)


def check_counts(option: str, values: Sequence[int], what: str, least: int = 1) -> None:
    """Raises UserError: one of the values is less than `least`."""
    for value in values:
        if value < least:
            raise UserError(option, value, f"is no number of {what}", f"an integer from {least}")


def check_pure_ssm(asked: Asked) -> None:
    """Raises UserError: a model has other layers than SSMs, which what is asked for does not run."""
    for title, (config, _) in asked.models.items():
        if not config.is_pure_ssm:
            raise UserError("--models", title, "has other layers than SSMs", "models of SSM layers alone")


def titles(names: Sequence[str]) -> list[str]:
    """What models are called: a config.json by its folder, or by its path where that is another's name too."""
    short = [name if name in MODELS else Path(name).resolve().parent.name for name in names]
    return [name if short.count(title) > 1 else title for name, title in zip(names, short, strict=True)]


def _raw(name: str) -> dict:
    if name in MODELS:
        return MODELS[name]
    try:
        found = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise UserError("--models", name, f"is no shape that is known, nor a file ({error})", _CONFIG) from None
    if not isinstance(found, dict):
        raise UserError("--models", name, "holds no config", _CONFIG)
    return found
