"""Cut, merge and re-cut tensors by a plan."""

from collections.abc import Sequence

import torch

from .plan import Plan, moves


def _along(axis: int, part: slice) -> tuple[slice, ...]:
    return (slice(None),) * axis + (part,)


def _zeros_like(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    return tensor.new_zeros((*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]))


def cut(tensor: torch.Tensor, axis: int, plan: Plan, rank: int) -> torch.Tensor:
    """The share of `rank`: a new tensor whose `axis` has plan.local_size elements, padding zero."""
    shard = _zeros_like(tensor, axis, plan.local_size)
    for piece in plan.pieces(rank):
        shard[_along(axis, piece.local_slice)] = tensor[_along(axis, plan.global_slice(piece))]
    return shard


def merge(shards: Sequence[torch.Tensor], axis: int, plan: Plan) -> torch.Tensor:
    """The whole tensor from the shards of all plan.tp ranks, padding dropped; replicas come from their first holder."""
    whole = _zeros_like(shards[0], axis, plan.packing.size)
    for rank in reversed(range(plan.tp)):
        for piece in plan.pieces(rank):
            whole[_along(axis, plan.global_slice(piece))] = shards[rank][_along(axis, piece.local_slice)]
    return whole


def recut(shards: Sequence[torch.Tensor], axis: int, old: Plan, new: Plan) -> list[torch.Tensor]:
    """Shards for new.tp ranks from those of old.tp ranks, without building the whole tensor."""
    result = [_zeros_like(shards[0], axis, new.local_size) for _ in range(new.tp)]
    for move in moves(old, new):
        result[move.target][_along(axis, move.target_slice)] = shards[move.source][_along(axis, move.source_slice)]
    return result
