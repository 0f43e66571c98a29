"""Tensors to payloads of bytes and back, cut in equal parts for the ranks.

Each function runs as Triton kernels on GPUs that have Triton, and in torch elsewhere: with the same bits, and
the kernels' contributions are summed in the same order.
"""

from functools import cache
from types import ModuleType

import torch

from .codes import decode_blocks, encode_blocks
from .payload import Layout
from .recipes import AllReduceRecipe


def encode(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The payload [parts, part_bytes] of x: any shape and strides (rows of one stride are read in place), any of
    recipes.DTYPES. Exact values and padding are left unwritten."""
    kernels = _kernels(x, layout.recipe)
    if kernels is not None:
        return kernels.encode(x, layout)
    size = layout.parts * layout.blocks * layout.recipe.block_size
    flat = x.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(size - layout.values)])
    return _pack(padded.view(-1, layout.recipe.block_size).float(), layout)


def decode_sum(payloads: torch.Tensor, layout: Layout, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` with the sum of several ranks' tensors.

    Args:
        payloads: [p, parts, part_bytes] of ranks 0 .. p - 1.
        out: [..] of layout.values elements; contiguous, or rows of one stride.

    Returns:
        `out`: ((x0 + x1) + x2) + .. in float32 in that order, rounded to its dtype.
    """
    kernels = _kernels(payloads, layout.recipe)
    if kernels is not None:
        return kernels.decode_sum(payloads, layout, out)
    total = _sum(payloads, layout)
    return out.copy_(total.view(-1)[: layout.values].view(out.shape))


def sum_and_encode(payloads: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The payload [1, part_bytes] of the sum of several ranks' payloads [p, 1, part_bytes] of `layout.one_part()`."""
    kernels = _kernels(payloads, layout.recipe)
    if kernels is not None:
        return kernels.sum_and_encode(payloads, layout)
    return _pack(_sum(payloads, layout), layout)


def _pack(blocks: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The payload of float32 [parts x blocks, block_size]."""
    payload = torch.empty(layout.parts, layout.part_bytes, dtype=torch.uint8, device=blocks.device)
    if layout.recipe.name == "bf16":
        codes = blocks.bfloat16().view(torch.uint8)
    else:
        codes, scales = encode_blocks(blocks, layout.recipe.name)
        payload[:, layout.scales_at : layout.exact_at] = scales.view(torch.uint8).view(layout.parts, -1)
    payload[:, : layout.scales_at] = codes.view(layout.parts, -1)
    return payload


def _unpack(payload: torch.Tensor, layout: Layout) -> torch.Tensor:
    """float32 [parts x blocks, block_size] of one rank's payload [parts, part_bytes]."""
    codes = payload[:, : layout.scales_at].reshape(-1, layout.recipe.block_bytes)
    if layout.recipe.name == "bf16":
        return codes.view(torch.bfloat16).float()
    scales = payload[:, layout.scales_at : layout.exact_at].reshape(-1).view(torch.float32)
    return decode_blocks(codes, scales, layout.recipe.name)


def _sum(payloads: torch.Tensor, layout: Layout) -> torch.Tensor:
    total = _unpack(payloads[0], layout)
    for payload in payloads[1:]:
        total += _unpack(payload, layout)
    return total


def _kernels(x: torch.Tensor, recipe: AllReduceRecipe) -> ModuleType | None:
    """The Triton kernels, where they serve. bfloat16 needs none: its codes are casts."""
    return _triton() if x.is_cuda and recipe.name != "bf16" else None


@cache
def _triton() -> ModuleType | None:
    try:
        from . import quantize_triton
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "triton":
            return None
        raise  # Triton is there, and something else is broken: torch in its place would hide it
    return quantize_triton
