"""The arithmetic of Mamba-2's gated RMS norm: on GPUs, where autograd records nothing, kernels (gated_norm_triton.py);
elsewhere what they are held to.

With s = silu(z) and w the norm's weight: after the gate  u = y s, out = w u / rms(u);  before it  out = w y s / rms(y).
A width that several ranks hold is normed in two steps, see layers/gated_norm.py. All arithmetic is float32.
Source: HF MambaRMSNormGated, Zamba2RMSNormGated, FalconH1RMSNormGated.
"""

from types import ModuleType

import torch
import torch.nn.functional as F

from .choose import kernels_can_take

WIDEST = 16384  # channels of a group, or columns of a product, that a program holds


def gated(y: torch.Tensor, z: torch.Tensor, before_gate: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be scaled, without its weight, and what its scale is taken of; both float32."""
    y, gate = y.float(), F.silu(z.float())
    return (y * gate, y) if before_gate else (y * gate, y * gate)


def gated_rms_norm(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, groups: int, before_gate: bool
) -> torch.Tensor:
    """y [.., D] gated and normed in `groups` runs of channels; rows of y and z of any stride.

    Returns:
        [.., D] in y's dtype, to which what is normed is rounded before it is multiplied with weight [D].
    """
    kernels = _kernels(y.shape[-1] // groups, y, z, weight)
    if kernels is not None:
        return kernels.gated_rms_norm(y, z, weight, eps, groups, before_gate)
    value, measured = gated(y, z, before_gate)
    mean = measured.unflatten(-1, (groups, -1)).pow(2).mean(-1, keepdim=True)
    normed = (value.unflatten(-1, (groups, -1)) * torch.rsqrt(mean + eps)).flatten(-2)
    return weight * normed.to(y.dtype)


def gated_values(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, before_gate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """w y s [.., D] in y's dtype, not normed, and the sum of squares that its scale is made of, float32 [.., 1]."""
    kernels = _kernels(y.shape[-1], y, z, weight)
    if kernels is not None:
        return kernels.gated_values(y, z, weight, before_gate)
    value, measured = gated(y, z, before_gate)
    return weight * value.to(y.dtype), measured.pow(2).sum(-1, keepdim=True)


def pack_sums(product: torch.Tensor, sums: torch.Tensor, rank: int, columns: int) -> torch.Tensor:
    """product [.., h] with sums [.., 1] (float32) in columns behind it that survive an addition of all ranks' packed
    products: [.., h + columns] in product's dtype. See partition.reductions.sum_columns."""
    kernels = _kernels(product.shape[-1], product, sums)
    if kernels is not None and product.dtype != torch.float32:
        return kernels.pack_sums(product, sums, rank, columns)
    return torch.cat([product, _in_columns(sums, product.dtype, rank, columns)], dim=-1)


def unpack_sums(packed: torch.Tensor, columns: int, eps: float) -> torch.Tensor:
    """The product [.., h] of the ranks' sum of packed products, over the root of the summed columns + eps."""
    kernels = _kernels(packed.shape[-1], packed)
    if kernels is not None:
        return kernels.unpack_sums(packed, columns, eps)
    product, sums = packed.split([packed.shape[-1] - columns, columns], dim=-1)
    mean = sums.float().sum(-1, keepdim=True)
    return (product.float() * torch.rsqrt(mean + eps)).to(packed.dtype)


def _in_columns(numbers: torch.Tensor, dtype: torch.dtype, rank: int, columns: int) -> torch.Tensor:
    """A float32 number as a column of float32, or as three pieces among half-precision columns of zeros."""
    if dtype == torch.float32:
        return numbers
    pieces, rest = [], numbers
    for _ in range(3):
        piece = rest.to(dtype)
        rest = rest - piece.float()
        pieces.append(piece)
    return F.pad(torch.cat(pieces, dim=-1), (3 * rank, columns - 3 * (rank + 1)))


def _kernels(width: int, *tensors: torch.Tensor) -> ModuleType | None:
    """gated_norm_triton.py, if it can take these."""
    if not kernels_can_take(*tensors) or width > WIDEST:
        return None
    from . import gated_norm_triton

    return gated_norm_triton
