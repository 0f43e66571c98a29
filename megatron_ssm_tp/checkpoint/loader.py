"""From lazy tensors on disk to one rank's parameters: all checked before the first is read, then one at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import DTYPES, ModelConfig
from ..errors import UserError
from ..partition.apply import cut
from ..partition.parameters import Parameter
from .families import Family, find_family
from .names import Stored
from .reader import Checkpoint


@dataclass(frozen=True)
class Source:
    """Where one of our parameters is read from: names as they are in this file."""

    stored: Stored
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
    config = family.config(_with_dtype(checkpoint))
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
    for ours, (stored, parameter) in family.tensors(config).items():
        shapes = stored.shapes(parameter)
        found = [_match_one(checkpoint, family, name, s) for name, s in zip(stored.names, shapes, strict=True)]
        sources[ours] = Source(replace(stored, names=tuple(found)), parameter)
    used = {name for source in sources.values() for name in source.stored.names}
    extra = [name for name in sorted(present - used) if not family.may_hold(_usual(family, name), config, used)]
    if extra:
        problem = f"is not part of this {family.name} model ({len(extra)} such)"
        raise UserError("tensor", ", ".join(extra[:3]), problem, "the tensors that config.json asks for")
    return sources


def _match_one(checkpoint: Checkpoint, family: Family, name: str, expected: tuple[int, ...]) -> str:
    """The name under which the file has this tensor, checked for shape and dtype."""
    others = [other + name.removeprefix(usual) for usual, other in family.aliases if name.startswith(usual)]
    present = [known for known in (name, *others) if known in checkpoint]
    if not present:
        raise UserError("tensor", name, "is missing from the checkpoint", f"shape {list(expected)}")
    shape, dtype = checkpoint.shape(present[0]), checkpoint.dtype(present[0])
    if shape != expected:
        raise UserError("tensor", present[0], f"has shape {list(shape)}", f"{list(expected)}, from config.json")
    if dtype not in DTYPES:
        raise UserError("tensor", present[0], f"has dtype {dtype}", ", ".join(DTYPES))
    return present[0]


def _usual(family: Family, name: str) -> str:
    """A file's name in the form that the family's rules have."""
    for usual, other in family.aliases:
        if name.startswith(other):
            return usual + name.removeprefix(other)
    return name


def read_into(target: torch.Tensor, checkpoint: Checkpoint, source: Source, rank: int, tp: int) -> None:
    """Fill one rank's parameter `target` from disk, reading only that rank's part; padding becomes zero.

    Tensors stored by head are small and are read whole.
    """
    parameter, names = source.parameter, source.stored.names
    plan = parameter.plan(tp)
    if source.stored.heads_axis is not None:
        whole = source.stored.arranged(_read(checkpoint, names[0]))
        target.copy_(cut(whole, parameter.axis, plan, rank))
        return
    if plan is None:
        target.copy_(_read(checkpoint, names[0]))
        return
    axis, pieces = parameter.axis, plan.pieces(rank)
    if sum(piece.stop - piece.start for piece in pieces) < plan.local_size:
        target.zero_()
    for piece in pieces:
        by_band = len(names) > 1
        name = names[piece.band] if by_band else names[0]
        found = slice(piece.start, piece.stop, 1) if by_band else plan.global_slice(piece)
        local = target.narrow(axis, piece.local, piece.stop - piece.start)
        local.copy_(_read(checkpoint, name, axis, found))


def _read(checkpoint: Checkpoint, name: str, axis: int = 0, part: slice | None = None) -> torch.Tensor:
    index = [slice(0, size, 1) for size in checkpoint.shape(name)]
    if part is not None:
        index[axis] = part
    return checkpoint.read(name, tuple(index))


@torch.no_grad()
def load_parameters(
    parameters: Mapping[str, torch.Tensor],
    model: ModelCheckpoint,
    rank: int,
    tp: int,
    bar: bool = False,
) -> None:
    """Fill all parameters of one rank, by our names; with a bar on stderr, if asked for.

    Holds no more than one tensor's local part beside the parameters themselves.

    Raises:
        ValueError: the parameters are not exactly those of the model's table (a mistake of ours, not of the user's).
    """
    if parameters.keys() != model.sources.keys():
        raise ValueError(f"parameters differ: {sorted(parameters.keys() ^ model.sources.keys())[:5]}")
    for name, source in tqdm(model.sources.items(), desc="loading", disable=None if bar else True):
        read_into(parameters[name].data, model.checkpoint, source, rank, tp)
