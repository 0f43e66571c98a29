"""RMS norms: on GPUs, where autograd records nothing, a kernel (norm_triton.py); elsewhere what it is held to."""

from types import ModuleType

import torch

from .choose import kernels_can_take
from .few_rows import joined

WIDEST = 65536  # columns of a row that a program can hold


def rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) over the last axis, computed in float32, in x's dtype; no weight (HF FalconMambaWeightlessRMSNorm)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * rms_normalize(x) (HF MambaRMSNorm).

    Args:
        x: [.., h], rows of any stride.
        weight: [h]. What is normalized is rounded to x's dtype, then to weight's, before it is multiplied.
        eps: added to the mean square.

    Returns:
        [.., h] in weight's dtype.
    """
    kernels = _kernels(x, weight)
    if kernels is not None:
        return kernels.rms_norm(x, weight, eps)
    return weight * rms_normalize(x, eps).to(weight.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and rms_norm of that in weight's dtype.

    Args:
        x: [.., h], rows of any stride; or [P, .., h] float32, the parts of few_rows.few_rows_parts.
        residual: [.., h], of the model's dtype or float32. Not changed.
        weight: [h].
        eps: added to the mean square.

    Returns:
        The sum [.., h] in residual's dtype, and its norm [.., h] in weight's.
    """
    kernels = _kernels(x, residual, weight)
    if kernels is not None:
        return kernels.add_rms_norm(x, residual, weight, eps)
    if x.ndim > residual.ndim:
        x = joined(x, weight.dtype)
    stream = (residual + x).to(residual.dtype)
    return stream, rms_norm(stream.to(weight.dtype), weight, eps)


def _kernels(x: torch.Tensor, *others: torch.Tensor) -> ModuleType | None:
    """norm_triton.py, if it can take these."""
    if not kernels_can_take(x, *others) or x.shape[-1] > WIDEST:
        return None
    from . import norm_triton

    return norm_triton
