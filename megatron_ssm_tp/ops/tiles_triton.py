"""few_rows.py's products for tensor cores: a program has tiles of some rows of the weight, in some of its columns.

The weight's tile is the left operand, whose rows are many, and x the right one, of at most 64 columns. Tiles are loaded
several ahead, into shared memory.
"""

import torch
import triton
import triton.language as tl

from .few_rows_launch import TilesLaunch
from .kernel_calls import launch
from .launching import last_axis_dense, power_of_two, row_unit
from .overlap_triton import ask_ahead, await_inputs

_FEWEST = 16  # columns of an operand


def tiles_product(x: torch.Tensor, weight: torch.Tensor, how: TilesLaunch) -> torch.Tensor:
    """x [s, K] weight [R, K]^T as sums over parts of the columns [P, s, R]: float32, or x's dtype where P is 1."""
    (requests, columns), rows = x.shape, weight.shape[0]
    dtype = x.dtype if how.parts == 1 else torch.float32
    out = torch.empty((how.parts, requests, rows), dtype=dtype, device=x.device)
    x, weight = last_axis_dense(x), weight.contiguous()
    unit = row_unit(x.stride(0))
    launch(
        tile_sums,
        (-(-rows // how.rows), how.parts),
        (x, weight, out),
        (requests, rows, x.stride(0) // unit),
        UNIT=unit,
        COLUMNS=columns,
        PART=columns // how.parts,
        AHEAD=min(how.ahead, columns // how.parts) if weight.data_ptr() % 16 == 0 else 0,
        REQUESTS=max(_FEWEST, power_of_two(requests)),
        ROWS=how.rows,
        BLOCK_K=how.block_k,
        STAGES=how.stages,
        num_warps=how.warps,
    )
    return out


@triton.jit(do_not_specialize=["requests"])
def tile_sums(
    x_ptr,
    weight_ptr,
    out_ptr,
    requests,
    rows,
    x_stride,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    AHEAD: tl.constexpr,
    REQUESTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows of the weight, in PART columns of it, times all rows of x. x_stride counts UNIT values."""
    row, part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    request, column = tl.arange(0, REQUESTS), part * PART + tl.arange(0, BLOCK_K)
    # Rows beyond the last one are the last one, and not stored: loads without masks go to shared memory directly.
    weight_at = weight_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * COLUMNS + column[None, :]
    if OVERLAPS and AHEAD > 0:
        _ask_for_first(weight_ptr + part * PART, rows, COLUMNS, AHEAD, ROWS)
    await_inputs(OVERLAPS)
    x_stride *= UNIT
    x_at = x_ptr + tl.minimum(request, requests - 1).to(tl.int64)[None, :] * x_stride + column[:, None]
    sums = tl.zeros((ROWS, REQUESTS), tl.float32)
    for k in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        weight = tl.load(weight_at + k, eviction_policy="evict_first")
        sums = tl.dot(weight, tl.load(x_at + k), sums)
    out_at = out_ptr + (part * requests + request).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=(request < requests)[None, :] & (row < rows)[:, None])


@triton.jit
def _ask_for_first(at, rows, COLUMNS: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr):
    """Ask ahead for the first AHEAD columns, behind `at`, of the program's rows: in halves, which are twice as many."""
    half, rows_here = tl.arange(0, 2 * ROWS), tl.program_id(0) * ROWS
    row = tl.minimum(rows_here + half // 2, rows - 1).to(tl.int64)
    width: tl.constexpr = at.dtype.element_ty.primitive_bitwidth // 8
    tl.static_assert(AHEAD // 2 * width % 16 == 0)
    ask_ahead(at + row * COLUMNS + half % 2 * (AHEAD // 2), AHEAD // 2 * width)
