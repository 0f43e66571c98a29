"""From lazy tensors on disk to one rank's parameters: all checked before the first is read, then one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import DTYPES, ModelConfig
from ..errors import UserError
from ..partition.layout import Parameter
from .families import Family, find_family
from .reader import Checkpoint


@dataclass(frozen=True)
class Source:
    """Where one of our parameters is read from."""

    file_name: str
    parameter: Parameter


@dataclass(frozen=True)
class ModelCheckpoint:
    """A checkpoint whose family is known and whose every tensor has been matched, by name and shape."""

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig
    sources: Mapping[str, Source]


def open_model(path: str | Path) -> ModelCheckpoint:
    """Open a checkpoint and match it to its family's table; reads headers only.

    Raises:
        UserError: an unreadable file, an unknown family, or a tensor that is missing, extra or misshapen.
    """
    checkpoint = Checkpoint(path)
    family = find_family(checkpoint.raw_config)
    config = family.read_config(family, _with_dtype(checkpoint))
    return ModelCheckpoint(checkpoint, family, config, _match(checkpoint, family, config))


def _with_dtype(checkpoint: Checkpoint) -> Mapping:
    """The raw config; where it says no dtype (the originals do not) the first tensor's stands in."""
    raw = checkpoint.raw_config
    if raw.get("dtype") or raw.get("torch_dtype") or not checkpoint.names():
        return raw
    return raw | {"dtype": checkpoint.dtype(checkpoint.names()[0])}


def _match(checkpoint: Checkpoint, family: Family, config: ModelConfig) -> dict[str, Source]:
    present = set(checkpoint.names())
    sources = {}
    for ours, (name, parameter) in family.tensors(config).items():
        stored = name if name in present else family.aliases.get(name, name)
        if stored not in present:
            raise UserError("tensor", name, "is missing from the checkpoint", f"shape {list(parameter.shape)}")
        shape, dtype = checkpoint.shape(stored), checkpoint.dtype(stored)
        if shape != parameter.shape:
            legal = f"{list(parameter.shape)}, from config.json"
            raise UserError("tensor", stored, f"has shape {list(shape)}", legal)
        if dtype not in DTYPES:
            raise UserError("tensor", stored, f"has dtype {dtype}", ", ".join(DTYPES))
        sources[ours] = Source(stored, parameter)
    extra = present - {source.file_name for source in sources.values()} - family.optional_names(config)
    if extra:
        some = ", ".join(sorted(extra)[:3])
        problem = f"is not part of this {family.name} model ({len(extra)} such)"
        raise UserError("tensor", some, problem, "the tensors that config.json asks for")
    return sources


def read_into(target: torch.Tensor, checkpoint: Checkpoint, source: Source, rank: int, tp: int) -> None:
    """Fill one rank's parameter `target` from disk, reading only that rank's part; padding becomes zero."""
    parameter = source.parameter
    whole = tuple(slice(0, size, 1) for size in parameter.shape)
    plan = parameter.plan(tp)
    if plan is None:
        target.copy_(checkpoint.read(source.file_name, whole))
        return
    axis = parameter.axis
    pieces = plan.pieces(rank)
    if sum(piece.stop - piece.start for piece in pieces) < plan.local_size:
        target.zero_()
    for piece in pieces:
        index = (*whole[:axis], plan.global_slice(piece), *whole[axis + 1 :])
        local = target.narrow(axis, piece.local, piece.stop - piece.start)
        local.copy_(checkpoint.read(source.file_name, index))


@torch.no_grad()
def load_parameters(
    parameters: Mapping[str, torch.Tensor],
    model: ModelCheckpoint,
    rank: int,
    tp: int,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Fill all parameters of one rank, by our names; `progress` is called with each name when it is done.

    Holds no more than one tensor's local part beside the parameters themselves.

    Raises:
        ValueError: the parameters are not exactly those of the model's table (a mistake of ours, not of the user's).
    """
    if parameters.keys() != model.sources.keys():
        raise ValueError(f"parameters differ: {sorted(parameters.keys() ^ model.sources.keys())[:5]}")
    for name, source in model.sources.items():
        read_into(parameters[name].data, model.checkpoint, source, rank, tp)
        progress(name)
