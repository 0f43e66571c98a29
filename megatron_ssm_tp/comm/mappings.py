"""Megatron's reduce_from_tensor_model_parallel_region, with a recipe."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings as megatron

from ..ops.few_rows import joined
from . import symmetric
from .backends import BACKENDS, all_reduce, choose
from .recipes import AllReduceRecipe


class _ReduceFromModelParallelRegion(torch.autograd.Function):
    """Forward: quantized all-reduce; backward: identity."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, group: dist.ProcessGroup, recipe: AllReduceRecipe, exact_columns: int
    ) -> torch.Tensor:
        return all_reduce(x, group, recipe, exact_columns)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient, None, None, None


def is_quantized(x: torch.Tensor, group: dist.ProcessGroup, recipe: AllReduceRecipe | None) -> bool:
    """Whether `recipe` reduces x: there is one, x is large enough, and of a dtype that it supports."""
    if recipe is None or group.size() == 1 or x.numel() * x.element_size() < recipe.min_bytes:
        return False
    return x.numel() > 0 and recipe.supports(x.dtype, group)[0]


def reduce_from_tensor_model_parallel_region(
    x: torch.Tensor,
    group: dist.ProcessGroup,
    recipe: AllReduceRecipe | None = None,
    exact_columns: int = 0,
) -> torch.Tensor:
    """Forward: all-reduce, quantized by `recipe`; backward: identity.

    Without a recipe, below its min_bytes, or for a dtype that it does not support this is Megatron's own function, to
    the bit (and as there a contiguous x is then overwritten). A quantized reduction leaves x alone.

    Args:
        x: [.., h], this rank's partial sums.
        group: the ranks to sum over; of one rank alone, x is returned.
        recipe: see recipes.py; the same on every rank.
        exact_columns: this many last columns of x are not quantized.

    Raises:
        UserError: the recipe names a backend that cannot reduce this, or exact_columns is not legal.
    """
    if group.size() == 1:
        return x
    quantized = is_quantized(x, group, recipe)
    if not torch.is_grad_enabled():  # an autograd function costs the host more than a launch
        return all_reduce(x, group, recipe, exact_columns) if quantized else megatron._reduce(x, group)
    if not quantized:
        return megatron.reduce_from_tensor_model_parallel_region(x, group=group)
    return _ReduceFromModelParallelRegion.apply(x, group, recipe, exact_columns)


def reduce_parts(
    parts: torch.Tensor, dtype: torch.dtype, group: dist.ProcessGroup, recipe: AllReduceRecipe
) -> torch.Tensor:
    """reduce_from_tensor_model_parallel_region of what few_rows.few_rows_parts gives: parts [P, .., h] of this rank's
    partial sums in `dtype`. Kernels of the symmetric backend add them as they send them; there is no backward then."""
    if len(parts) > 1:
        out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
        if is_quantized(out, group, recipe) and choose(out, group, recipe) is BACKENDS["symmetric"]:
            return symmetric.all_reduce(parts, group, recipe, out=out)
    return reduce_from_tensor_model_parallel_region(joined(parts, dtype), group, recipe)
