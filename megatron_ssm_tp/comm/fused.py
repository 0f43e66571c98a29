"""all_reduce_add_norm: a reduction, the residual stream's addition and the norm that reads it, in one kernel."""

import torch
import torch.distributed as dist

from ..errors import UserError
from ..ops.few_rows import joined
from ..ops.norm import add_rms_norm
from . import symmetric
from .mappings import is_quantized, reduce_from_tensor_model_parallel_region
from .recipes import AllReduceRecipe


def all_reduce_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: dist.ProcessGroup,
    recipe: AllReduceRecipe | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + the sum of x over the ranks, and the RMS norm of that; for inference, there is no backward.

    One kernel where the symmetric backend reduces x and rows like x's are worth it (symmetric.fits); otherwise
    reduce_from_tensor_model_parallel_region, which without a recipe overwrites x, and ops.norm.add_rms_norm. Both round
    to the same dtypes at the same places; they sum a row's squares in another order.

    Args:
        x: [.., h], this rank's partial sums, the same shape and dtype on every rank; or parts of them in weight's dtype
            [P, .., h], see few_rows.few_rows_parts.
        residual: [.., h], the residual stream, of x's dtype or float32. Not changed.
        weight: [h] of the norm (layers.norm.LocalRMSNorm).
        eps: of the norm.
        group: the ranks to sum over.
        recipe: see recipes.py; the same on every rank.

    Returns:
        The new residual stream [.., h] in residual's dtype, and its norm [.., h] in weight's dtype.

    Raises:
        UserError: the recipe names a backend that cannot reduce this; shapes do not go together; gradients are wanted.
    """
    _check(x, residual, weight)
    whole = x if x.dim() == residual.dim() else torch.empty_like(residual, dtype=weight.dtype)
    asked = is_quantized(whole, group, recipe) and recipe.backend in ("auto", "symmetric")
    if asked and symmetric.fits(whole, residual.dtype, recipe) and symmetric.supports(whole, group, recipe)[0]:
        return symmetric.all_reduce_add_norm(x, residual, weight, eps, group, recipe)
    if whole is not x:
        x = joined(x, weight.dtype)
    return add_rms_norm(reduce_from_tensor_model_parallel_region(x, group, recipe), residual, weight, eps)


def _check(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    if residual.shape not in (x.shape, x.shape[1:]):
        raise UserError("residual", tuple(residual.shape), "has another shape than x", f"{tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise UserError("weight", tuple(weight.shape), "does not go with x's columns", f"{tuple(x.shape[-1:])}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, weight)):
        raise UserError("requires_grad", True, "there is no backward", "under torch.no_grad() or inference_mode()")
