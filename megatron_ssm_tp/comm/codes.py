"""The codes of a block: what a format's bits mean, in torch. The truth that the kernels are held to.

A block is `block_size` neighbouring values of the flattened tensor and one float32 scale. Value = code x |scale|, with
scale = largest finite magnitude / largest code. float32, because a scale must span what bfloat16 spans (up to 3.4e38,
where float16 ends at 65504) and because its rounding must not cost codes; it is 3 % of an int8 block of 128.
A scale is at least 2^-126, so that its reciprocal is finite and an all-zero block is zeros; values of a block below
2^-126 x the largest code thus come in steps of 2^-126.

NaN and Inf arrive as themselves, each in its place. A block that holds any says so by a negative scale, and only in it
the outermost codes are set aside; other blocks pay nothing:

            plain blocks    blocks with a negative scale
            finite codes    finite codes    +Inf, -Inf    NaN
    int8    -127 .. 127     -126 .. 126     127, -127     -128
    fp8     -448 .. 448     -416 .. 416     448, -448     e4m3's own
    int4      -7 .. 7         -6 .. 6         7, -7         -8

The scale is taken of the block's finite values, so that the neighbours of an Inf are as exact as those codes allow.

Shapes: values float32 [blocks, block_size], codes uint8 [blocks, block_bytes], scales float32 [blocks].
"""

import numpy as np
import torch

from .recipes import AllReduceRecipe

SMALLEST_SCALE = 2.0**-126
_LIMITS = {"int8": (127.0, 126.0), "fp8": (448.0, 416.0), "int4": (7.0, 6.0)}


def limits(format: str) -> tuple[float, float]:
    """The largest finite code of a plain block, and of one with a negative scale."""
    return _LIMITS[format]


def steps(format: str) -> tuple[float, float]:
    """What a block's largest magnitude is multiplied with to give its scale: 1 / limit as float32, less 2^-22.

    A little less, so that code x scale never exceeds that magnitude and with it the range of the dtype.
    """
    plain, special = (float(np.float32((1 - 2.0**-22) / limit)) for limit in _LIMITS[format])
    return plain, special


def encode_blocks(values: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of values; `format` is a quantizing recipe's name."""
    finite = values.isfinite()
    kept = torch.where(finite, values, 0.0)
    special = ~finite.all(1)
    plain_step, special_step = steps(format)
    largest = kept.abs().amax(1)
    scales = (largest * torch.where(special, special_step, plain_step)).clamp(min=SMALLEST_SCALE)
    units = kept * (1.0 / scales)[:, None]
    units = units if format == "fp8" else units.round()
    outermost = torch.copysign(torch.full_like(units, limits(format)[0]), values)
    units = torch.where(values.isinf(), outermost, units)
    return _to_bits(units, values.isnan(), format), torch.where(special, -scales, scales)


def _to_bits(units: torch.Tensor, nan: torch.Tensor, format: str) -> torch.Tensor:
    if format == "fp8":
        return torch.where(nan, 0x7F, units.to(torch.float8_e4m3fn).view(torch.uint8))
    if format == "int8":
        return torch.where(nan, -128.0, units).to(torch.int8).view(torch.uint8)
    nibbles = torch.where(nan, -8.0, units).to(torch.int8).view(torch.uint8) & 0xF
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def decode_blocks(codes: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor:
    """Values of codes and scales."""
    units, (limit, _) = _from_bits(codes, format), limits(format)
    values = units * scales.abs()[:, None]
    aside = (scales < 0)[:, None] & ~(units.abs() < limit)
    return torch.where(aside, torch.where(units.abs() == limit, units * torch.inf, torch.nan), values)


def _from_bits(codes: torch.Tensor, format: str) -> torch.Tensor:
    if format == "fp8":
        return codes.view(torch.float8_e4m3fn).float()
    if format == "int8":
        return codes.view(torch.int8).float()
    nibbles = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(1)
    return (nibbles << 4).view(torch.int8).float() / 16  # the sign is in the upper bit


def rounding_bound(values: torch.Tensor, recipe: AllReduceRecipe) -> torch.Tensor:
    """How far each of values [blocks, block_size], float32, may be off after one encoding; 0 where it is not finite."""
    finite = values.isfinite()
    kept = torch.where(finite, values, 0.0)
    if recipe.name == "bf16":
        return kept.abs() * 2.0**-8
    limit = torch.where(finite.all(1), *limits(recipe.name))
    scales = (kept.abs().amax(1) / limit).clamp(min=SMALLEST_SCALE)[:, None]
    bound = torch.maximum(kept.abs() * 2.0**-4, scales * 2.0**-10) if recipe.name == "fp8" else scales / 2
    return torch.where(finite, bound * (1 + 2.0**-16), 0.0)


def bound_of_sum(contributions: list[torch.Tensor], recipe: AllReduceRecipe, two_shot: bool) -> torch.Tensor:
    """How far a quantized sum of the ranks' tensors may be off the exact one; says nothing where that is not finite.

    Args:
        contributions: one a rank, of one shape and dtype; the sum has their dtype.
        recipe: what each of them was encoded with.
        two_shot: whether the sum was encoded as well.

    Returns:
        float64, of the contributions' shape.
    """
    shape, dtype = contributions[0].shape, contributions[0].dtype
    blocks = [_in_blocks(x, recipe.block_size) for x in contributions]
    exact = sum(blocks)
    bound = sum(rounding_bound(x, recipe) for x in blocks)
    bound = bound + 1e-6 * sum(x.abs() for x in blocks)  # float32 sums
    if two_shot:
        bound = bound + rounding_bound(exact.abs() + bound, recipe)
    finfo = torch.finfo(dtype)  # the result's own rounding
    bound = bound + (exact.abs() + bound) * finfo.eps + finfo.smallest_normal * finfo.eps
    return bound.flatten()[: contributions[0].numel()].view(shape).double()


def _in_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(x.flatten().float(), (0, -x.numel() % size)).view(-1, size)
