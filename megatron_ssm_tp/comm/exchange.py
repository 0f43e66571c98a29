"""What one kernel makes and exchanges over the ranks, where it is so little that a launch of its own would cost more.

By kernels over a group's shared memory (symmetric.py), where recipes ask for 16-bit sums.
"""

import torch
import torch.distributed as dist

from ..ops.choose import kernels_can_take
from ..ops.few_rows import IN_LANES, few_rows_parts
from . import mappings, symmetric
from .recipes import AllReduceRecipe

_ROWS_AT_ONCE = 1024  # of a weight: a program each; an H100 runs as many at a time
_MOST_ROWS = 16384  # whose sums a program can hold


def linear_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, recipe: AllReduceRecipe
) -> torch.Tensor:
    """few_rows.few_rows_linear, summed over the ranks by `recipe`; in inference.

    One kernel for one or two rows of x and a weight of few, as x_proj's: the bits are those of two.

    Args:
        x: [.., K/p].
        weight: [R, K/p].

    Returns:
        [.., R], x's dtype.
    """
    if _is_exchanged(x, weight, group, recipe, _ROWS_AT_ONCE):
        return _product(x, weight, group, wait=True)
    return mappings.reduce_parts(few_rows_parts(x, weight), x.dtype, group, recipe)


def sent_product(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, recipe: AllReduceRecipe
) -> torch.Tensor | None:
    """As linear_all_reduce for a weight of any number of rows, but for the sum: this rank's product, while the others'
    is under way. The next call over the group must be sum_add_norm of it. None: it has to be made and reduced apart."""
    if not _is_exchanged(x, weight, group, recipe, _MOST_ROWS):
        return None
    return _product(x, weight, group, wait=False)


def sum_add_norm(
    own: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """fused.all_reduce_add_norm of what sent_product has returned."""
    from .exchange_triton import sum_add_norm

    return sum_add_norm(symmetric.workspace_of(group), own, residual, weight, eps)


def _is_exchanged(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, recipe: AllReduceRecipe, most: int
) -> bool:
    """Whether a product of one or two rows of x, and at most so many of the weight, goes by words."""
    few = 0 < x.shape[:-1].numel() <= IN_LANES and 0 < weight.shape[0] <= most and x.dtype == weight.dtype
    return few and recipe.min_bytes == 0 and kernels_can_take(x, weight) and shares_words(x, group, recipe)


def _product(x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, wait: bool) -> torch.Tensor:
    from .exchange_triton import reduced_product

    out = reduced_product(symmetric.workspace_of(group), x.reshape(-1, x.shape[-1]), weight, wait)
    return out.view(*x.shape[:-1], -1)


def argmax_over_ranks(x: torch.Tensor, first: int, columns: int, group: dist.ProcessGroup) -> torch.Tensor:
    """argmax.argmax_rows of rows whose columns lie one after the other on the ranks; where shares_words says so.

    Args:
        x: [rows, V/p], of which the first `columns` count; a rank may have none that do.
        first: the number of this rank's first column.

    Returns:
        int64 [rows], the same on every rank.
    """
    from .exchange_triton import largest_over_ranks

    return largest_over_ranks(symmetric.workspace_of(group), x, first, columns)


def shares_words(x: torch.Tensor, group: dist.ProcessGroup, recipe: AllReduceRecipe | None) -> bool:
    """Whether `recipe` asks for sums of 16 bits that kernels of ours make of x: what is of few words then goes by
    them. The same on every rank."""
    asked = recipe is not None and recipe.name == "bf16" and recipe.backend in ("auto", "symmetric")
    return asked and x.dtype == torch.bfloat16 and group.size() > 1 and symmetric.supports(x, group, recipe)[0]
