"""quantize.py's functions as Triton kernels. Imports Triton: imported where it is there, by quantize.py alone."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..ops.kernel_calls import KernelCall, variant
from .payload import Layout
from .tiles import addresses, decode_tile, encode_tile

_TILE = 2048  # values a program holds: 16 a thread
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}  # without fusion the bits are those of the reference


@triton.jit
def _code_addresses(blocks, blocks_per_part, part_bytes, BLOCK_BYTES: tl.constexpr):
    """Where blocks' codes [BLOCKS, BLOCK_BYTES] begin in bytes and their scales [BLOCKS] in float32s."""
    start = (blocks // blocks_per_part).to(tl.int64) * part_bytes
    within = (blocks % blocks_per_part).to(tl.int64)
    codes = (start + within * BLOCK_BYTES)[:, None] + tl.arange(0, BLOCK_BYTES)[None, :]
    return codes, (start + tl.cast(blocks_per_part, tl.int64) * BLOCK_BYTES) // 4 + within


@triton.jit
def _load_sum(
    codes_ptr,
    scales_ptr,
    blocks,
    mask,
    blocks_per_part,
    part_bytes,
    rank_bytes,
    FORMAT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    RANKS: tl.constexpr,
):
    """float32 [BLOCKS, BLOCK_SIZE]: the ranks' decoded blocks, summed in rank order."""
    codes_at, scales_at = _code_addresses(blocks, blocks_per_part, part_bytes, BLOCK_BYTES)
    codes = tl.load(codes_ptr + codes_at, mask=mask[:, None], other=0)
    total = decode_tile(codes, tl.load(scales_ptr + scales_at, mask=mask, other=0.0), FORMAT)
    for rank in tl.static_range(1, RANKS):
        offset = tl.cast(rank_bytes, tl.int64) * rank
        codes = tl.load(codes_ptr + offset + codes_at, mask=mask[:, None], other=0)
        scales = tl.load(scales_ptr + offset // 4 + scales_at, mask=mask, other=0.0)
        total += decode_tile(codes, scales, FORMAT)
    return total


@triton.jit
def _store_codes(
    values,
    codes_ptr,
    scales_ptr,
    blocks,
    mask,
    blocks_per_part,
    part_bytes,
    FORMAT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    codes, scales = encode_tile(values, FORMAT)
    codes_at, scales_at = _code_addresses(blocks, blocks_per_part, part_bytes, BLOCK_BYTES)
    tl.store(codes_ptr + codes_at, codes, mask=mask[:, None])
    tl.store(scales_ptr + scales_at, scales, mask=mask)


@triton.jit
def _encode_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    values,
    row_length,
    row_stride,
    all_blocks,
    blocks_per_part,
    part_bytes,
    CONTIGUOUS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    places, address = addresses(blocks, row_length, row_stride, CONTIGUOUS, BLOCK_SIZE)
    x = tl.load(x_ptr + address, mask=places < values, other=0.0).to(tl.float32)
    mask = blocks < all_blocks
    _store_codes(x, codes_ptr, scales_ptr, blocks, mask, blocks_per_part, part_bytes, FORMAT, BLOCK_BYTES)


@triton.jit
def _decode_sum_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,
    values,
    row_length,
    row_stride,
    all_blocks,
    blocks_per_part,
    part_bytes,
    rank_bytes,
    CONTIGUOUS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANKS: tl.constexpr,
):
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    total = _load_sum(
        codes_ptr,
        scales_ptr,
        blocks,
        blocks < all_blocks,
        blocks_per_part,
        part_bytes,
        rank_bytes,
        FORMAT,
        BLOCK_BYTES,
        RANKS,
    )
    places, address = addresses(blocks, row_length, row_stride, CONTIGUOUS, BLOCK_SIZE)
    tl.store(out_ptr + address, total.to(out_ptr.dtype.element_ty), mask=places < values)


@triton.jit
def _sum_and_encode_kernel(
    codes_ptr,
    scales_ptr,
    out_codes_ptr,
    out_scales_ptr,
    all_blocks,
    part_bytes,
    FORMAT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANKS: tl.constexpr,
):
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mask = blocks < all_blocks
    total = _load_sum(
        codes_ptr, scales_ptr, blocks, mask, all_blocks, part_bytes, part_bytes, FORMAT, BLOCK_BYTES, RANKS
    )
    _store_codes(total, out_codes_ptr, out_scales_ptr, blocks, mask, all_blocks, part_bytes, FORMAT, BLOCK_BYTES)


def encode(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """quantize.encode."""
    strides = row_strides(x)
    if strides is None:
        x, strides = x.contiguous(), (x.numel(), x.numel())
    payload = torch.empty(layout.parts, layout.part_bytes, dtype=torch.uint8, device=x.device)
    _call(_encode_kernel, layout, 1, variant(x), strides)(x, *_codes_and_scales(payload))
    return payload


def decode_sum(payloads: torch.Tensor, layout: Layout, out: torch.Tensor) -> torch.Tensor:
    """quantize.decode_sum."""
    strides = row_strides(out)
    if strides is None:
        return out.copy_(decode_sum(payloads, layout, torch.empty(out.shape, dtype=out.dtype, device=out.device)))
    call = _call(_decode_sum_kernel, layout, payloads.shape[0], variant(payloads, out), strides)
    call(*_codes_and_scales(payloads), out)
    return out


def sum_and_encode(payloads: torch.Tensor, layout: Layout) -> torch.Tensor:
    """quantize.sum_and_encode."""
    payload = torch.empty(1, layout.part_bytes, dtype=torch.uint8, device=payloads.device)
    call = _call(_sum_and_encode_kernel, layout, payloads.shape[0], variant(payloads))
    call(*_codes_and_scales(payloads), *_codes_and_scales(payload))
    return payload


@lru_cache(maxsize=1024)
def _call(
    kernel: object,
    layout: Layout,
    ranks: int,
    tensors: tuple,
    strides: tuple[int, int] = (0, 0),
) -> KernelCall:
    """A kernel's launch for payloads of `layout` and tensors of one `variant`, with rows of this length and stride."""
    recipe, (row_length, row_stride) = layout.recipe, strides
    blocks = layout.parts * layout.blocks
    a_tile = max(1, _TILE // recipe.block_size)
    arguments = {
        "values": layout.values,
        "row_length": row_length,
        "row_stride": row_stride,
        "all_blocks": blocks,
        "blocks_per_part": layout.blocks,
        "part_bytes": layout.part_bytes,
        "rank_bytes": layout.parts * layout.part_bytes,
        "CONTIGUOUS": row_length in (row_stride, layout.values),
        "FORMAT": recipe.name,
        "BLOCK_SIZE": recipe.block_size,
        "BLOCK_BYTES": recipe.block_bytes,
        "BLOCKS": a_tile,
        "RANKS": ranks,
    }
    return KernelCall(kernel, (triton.cdiv(blocks, a_tile),), arguments, _LAUNCH)


def row_strides(x: torch.Tensor) -> tuple[int, int] | None:
    """(length, stride) of the rows that x is made of, contiguous in themselves and equally far apart; else None."""
    if x.is_contiguous():
        return x.numel(), x.numel()
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:  # its rows are not equally far apart
        return None
    return (rows.shape[1], rows.stride(0)) if rows.stride(1) == 1 else None


def _codes_and_scales(payload: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return payload, payload.view(torch.float32)
