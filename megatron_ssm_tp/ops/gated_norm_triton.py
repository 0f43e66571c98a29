"""gated_norm.py as Triton kernels: each tensor is read or written once.

A program holds a row, or a group of its channels, some 16 values a thread. 8192 tokens x 5120 channels in bfloat16 are
three times 84 MB for a norm, 0.08 ms at 3 TB/s.
"""

import torch
import triton
import triton.language as tl

from .elementwise_triton import silu
from .kernel_calls import launch
from .launching import last_axis_dense, power_of_two, row_unit
from .norm_triton import tile_of
from .overlap_triton import await_inputs


def gated_rms_norm(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, groups: int, before_gate: bool
) -> torch.Tensor:
    """gated_norm.gated_rms_norm."""
    return _gate(y, z, weight, None, eps, groups, before_gate)


def gated_values(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, before_gate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """gated_norm.gated_values."""
    squares = torch.empty((*y.shape[:-1], 1), dtype=torch.float32, device=y.device)
    return _gate(y, z, weight, squares, 0.0, 1, before_gate), squares


def _gate(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    squares: torch.Tensor | None,
    eps: float,
    groups: int,
    before_gate: bool,
) -> torch.Tensor:
    out = torch.empty(y.shape, dtype=torch.promote_types(y.dtype, weight.dtype), device=y.device)
    if not y.numel():
        return out
    width = y.shape[-1] // groups
    y, z = (last_axis_dense(t.reshape(-1, t.shape[-1])) for t in (y, z))
    (_, tile, warps), unit = tile_of(width), row_unit(y.stride(0), z.stride(0))
    strides = (y.stride(0) // unit, z.stride(0) // unit)
    launch(
        gate_rows,
        (y.shape[0], groups),
        (y, z, weight.contiguous(), out, squares),
        (*strides, y.shape[1], eps),
        UNIT=unit,
        WIDTH=width,
        TILE=tile,
        BEFORE_GATE=before_gate,
        num_warps=warps,
    )
    return out


def pack_sums(product: torch.Tensor, sums: torch.Tensor, rank: int, columns: int) -> torch.Tensor:
    """gated_norm.pack_sums, of products in half precision."""
    width = product.shape[-1]
    packed = torch.empty((*product.shape[:-1], width + columns), dtype=product.dtype, device=product.device)
    if not product.numel():
        return packed
    product = last_axis_dense(product.reshape(-1, width))
    _, tile, warps = tile_of(width + columns)
    tensors, numbers = (product, sums.contiguous(), packed), (product.stride(0), width, 3 * rank, columns)
    launch(pack_rows, (product.shape[0],), tensors, numbers, TILE=tile, num_warps=warps)
    return packed


def unpack_sums(packed: torch.Tensor, columns: int, eps: float) -> torch.Tensor:
    """gated_norm.unpack_sums."""
    width = packed.shape[-1] - columns
    out = torch.empty((*packed.shape[:-1], width), dtype=packed.dtype, device=packed.device)
    if not out.numel():
        return out
    packed = last_axis_dense(packed.reshape(-1, width + columns))
    _, tile, warps = tile_of(width)
    launch(
        unpack_rows,
        (packed.shape[0],),
        (packed, out),
        (packed.stride(0), width, columns, eps),
        TILE=tile,
        SUMS=power_of_two(columns),
        num_warps=warps,
    )
    return out


@triton.jit
def gate_rows(
    y_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    squares_ptr,
    y_stride,
    z_stride,
    out_stride,
    eps,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BEFORE_GATE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """WIDTH channels of a row: normed; or, if squares_ptr is given, left as they are and their squares' sum stored.

    The strides of y and z count UNIT values.
    """
    await_inputs(OVERLAPS)
    row, within = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    mask = within < WIDTH
    column = tl.program_id(1) * WIDTH + within
    z = tl.load(z_ptr + row * z_stride * UNIT + column, mask=mask, other=0.0)
    given = tl.load(y_ptr + row * y_stride * UNIT + column, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    y = given.to(tl.float32)
    value = y * silu(z.to(tl.float32))
    measured = y if BEFORE_GATE else value
    total = tl.sum(measured * measured, axis=0)
    if squares_ptr is None:
        value = value * tl.rsqrt(total / WIDTH + eps)
    else:
        tl.store(squares_ptr + row, total)
    value = value.to(given.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pack_rows(product_ptr, sums_ptr, packed_ptr, product_stride, width, first, columns, TILE: tl.constexpr):
    """A row of the product, and behind it its sum in three pieces from column `first` on, zeros around them."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    x = tl.load(product_ptr + row * product_stride + column, mask=column < width, other=0.0)
    rest, piece = tl.load(sums_ptr + row), column - width - first
    for i in tl.static_range(3):
        rounded = rest.to(x.dtype)
        x = tl.where(piece == i, rounded, x)
        rest -= rounded.to(tl.float32)
    tl.store(packed_ptr + row * (width + columns) + column, x, mask=column < width + columns)


@triton.jit
def unpack_rows(packed_ptr, out_ptr, packed_stride, width, columns, eps, TILE: tl.constexpr, SUMS: tl.constexpr):
    """A row of the product over the root of the mean that its last columns add up to."""
    row, column, i = tl.program_id(0).to(tl.int64), tl.arange(0, TILE), tl.arange(0, SUMS)
    at = packed_ptr + row * packed_stride
    x = tl.load(at + column, mask=column < width, other=0.0)
    mean = tl.sum(tl.load(at + width + i, mask=i < columns, other=0.0).to(tl.float32), axis=0)
    normed = x.to(tl.float32) * tl.rsqrt(mean + eps)
    tl.store(out_ptr + row * width + column, normed.to(x.dtype), mask=column < width)
