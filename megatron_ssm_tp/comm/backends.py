"""Who carries a quantized all-reduce: the first backend, in order, that can."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..errors import UserError
from . import collectives, symmetric
from .recipes import AllReduceRecipe


class Backend(NamedTuple):
    """A way to reduce.

    supports(x, group, recipe) -> (ok, reason): the same answer on every rank of the group.
    all_reduce(x, group, recipe, exact_columns=0) -> the sum, as collectives.all_reduce gives it.
    """

    supports: Callable[[torch.Tensor, dist.ProcessGroup, AllReduceRecipe], tuple[bool, str]]
    all_reduce: Callable[..., torch.Tensor]


BACKENDS = {
    "symmetric": Backend(symmetric.supports, symmetric.all_reduce),
    "collective": Backend(lambda x, group, recipe: recipe.supports(x.dtype, group), collectives.all_reduce),
}


def choose(x: torch.Tensor, group: dist.ProcessGroup, recipe: AllReduceRecipe) -> Backend:
    """The backend that the recipe names, or with "auto" the first that supports it.

    Raises:
        UserError: the one that is named does not, or none does.
    """
    names = list(BACKENDS) if recipe.backend == "auto" else [recipe.backend]
    reason = ""
    for name in names:
        ok, refused = BACKENDS[name].supports(x, group, recipe)
        if ok:
            if reason and x.is_cuda and group.size() > 1 and group.rank() == 0:
                # Once for each reason. Slower than a plain all-reduce where links are fast: nobody should wonder why.
                warnings.warn(f"all-reduces are quantized by the backend {name!r}: {reason}", stacklevel=2)
            return BACKENDS[name]
        reason = refused
    raise UserError("backend", recipe.backend, f"cannot reduce this: {reason}", _others(recipe))


def check_named(recipe: AllReduceRecipe, group: dist.ProcessGroup, device: torch.device) -> None:
    """Find out before the first reduction whether the backend that `recipe` names can reduce on `device`: a collective
    call, in which "symmetric" allocates its buffers. Of "auto" there is nothing to find out.

    Raises:
        UserError: it cannot; the same on every rank.
    """
    if recipe.backend == "auto" or group.size() == 1:
        return
    ok, reason = False, "needs GPUs"
    if recipe.backend != "symmetric" or device.type == "cuda":
        x = torch.empty(0, dtype=torch.bfloat16, device=device)
        ok, reason = BACKENDS[recipe.backend].supports(x, group, recipe)
    if not ok:
        raise UserError("backend", recipe.backend, reason, _others(recipe))


def _others(recipe: AllReduceRecipe) -> str:
    """The backends that a recipe could name instead."""
    return ", ".join(name for name in ("auto", *BACKENDS) if name != recipe.backend)


def all_reduce(
    x: torch.Tensor, group: dist.ProcessGroup, recipe: AllReduceRecipe, exact_columns: int = 0
) -> torch.Tensor:
    """collectives.all_reduce by the backend of `choose`."""
    return choose(x, group, recipe).all_reduce(x, group, recipe, exact_columns=exact_columns)
