"""What one kernel makes and exchanges over the ranks, where it is so little that a launch of its own would cost more.

By kernels over a group's shared memory (symmetric.py), where recipes ask for them.
"""

import torch
import torch.distributed as dist

from ..ops.choose import kernels_can_take
from ..ops.few_rows import few_rows_parts
from ..ops.few_rows_launch import IN_LANES
from . import mappings, symmetric
from .recipes import AllReduceRecipe

_MOST_ROWS = 1024  # of a weight: a program each; an H100 runs as many at a time


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
    few = 0 < x.shape[:-1].numel() <= IN_LANES and weight.shape[0] <= _MOST_ROWS and x.dtype == weight.dtype
    plain = recipe.name == "bf16" and recipe.min_bytes == 0
    if few and plain and kernels_can_take(x, weight) and shares_words(x, group, recipe):
        from .exchange_triton import reduced_product

        out = reduced_product(symmetric.workspace_of(group), x.reshape(-1, x.shape[-1]), weight)
        return out.view(*x.shape[:-1], -1)
    return mappings.reduce_parts(few_rows_parts(x, weight), x.dtype, group, recipe)


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
    """Whether by `recipe` kernels of ours would reduce x, of 16 bits: what is exchanged exactly then goes by them too.
    The same on every rank."""
    asked = recipe is not None and recipe.backend in ("auto", "symmetric")
    large = asked and x.numel() * x.element_size() >= recipe.min_bytes
    return large and x.dtype == torch.bfloat16 and group.size() > 1 and symmetric.supports(x, group, recipe)[0]
