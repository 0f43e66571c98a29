"""few_rows.py's products in lanes: a program has some rows of the weight and walks along their columns.

A thread holds neighbouring columns of the weight, and the same of x, and sums what it has: threads meet once, at the
end. Tiles are loaded several ahead, into registers, and the walk is unrolled.
"""

import torch
import triton
import triton.language as tl

from .few_rows_launch import FewRowsLaunch
from .kernel_calls import launch
from .launching import last_axis_dense, row_unit
from .overlap_triton import await_inputs


def few_rows_product(x: torch.Tensor, weight: torch.Tensor, how: FewRowsLaunch) -> torch.Tensor:
    """x [s, K] weight [R, K]^T in x's dtype."""
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if out.numel():
        grid, tensors, numbers, constants = in_lanes(x, weight, how)
        launch(lane_sums, grid, (*tensors, out), numbers, **constants)
    return out


def in_lanes(
    x: torch.Tensor, weight: torch.Tensor, how: FewRowsLaunch
) -> tuple[tuple[int], tuple[torch.Tensor, torch.Tensor], tuple[int, int], dict[str, int]]:
    """What kernels that call `row_products` are launched with: the grid; x and the weight; their rows and x_stride; and
    constants."""
    (requests, columns), rows = x.shape, weight.shape[0]
    x, weight = last_axis_dense(x), weight.contiguous()
    unit = row_unit(x.stride(0))
    constants = {"UNIT": unit, "COLUMNS": columns, "REQUESTS": requests, "ROWS": how.rows, "BLOCK_K": how.block_k}
    constants |= {"STAGES": how.stages, "num_warps": how.warps}
    return (-(-rows // how.rows),), (x, weight), (rows, x.stride(0) // unit), constants


@triton.jit
def lane_sums(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    x_stride,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    REQUESTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows of the weight, times REQUESTS rows of x. x_stride counts UNIT values."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = row_products(
        x_ptr, x_stride * UNIT, weight_ptr, row, rows, COLUMNS, REQUESTS, ROWS, BLOCK_K, STAGES, OVERLAPS
    )
    for request in tl.static_range(REQUESTS):
        tl.store(out_ptr + request * rows + row, sums[request].to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def row_products(
    x_ptr,
    x_stride,
    weight_ptr,
    row,
    rows,
    COLUMNS: tl.constexpr,
    REQUESTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """For each of REQUESTS rows of x its products [ROWS], float32, with the weight's rows `row` [ROWS], of `rows`."""
    weight_at = weight_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * COLUMNS
    steps: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    tiles, sums = first_tiles(weight_at, COLUMNS, REQUESTS, ROWS, BLOCK_K, STAGES)
    await_inputs(OVERLAPS)
    for step in tl.static_range(steps):
        x = ()
        for request in tl.static_range(REQUESTS):
            x = x + (load_columns(x_ptr + request * x_stride, step, COLUMNS, BLOCK_K, False).to(tl.float32),)
        sums = add_products(sums, tiles[0], x, REQUESTS, ROWS, BLOCK_K)
        tiles = next_tiles(tiles, weight_at, step + STAGES, COLUMNS, BLOCK_K)
    whole = ()
    for request in tl.static_range(REQUESTS):
        whole = whole + (tl.sum(sums[request], axis=1),)
    return whole


@triton.jit
def load_columns(at, step, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, ONCE: tl.constexpr):
    """The step-th BLOCK_K columns of the row, or rows [ROWS, 1], that begin at `at`; zeros beyond COLUMNS. ONCE: they
    are read by nobody else."""
    policy: tl.constexpr = "evict_first" if ONCE else "evict_last"
    column = (step * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    if COLUMNS % BLOCK_K == 0:
        return tl.load(at + column, eviction_policy=policy)
    else:
        return tl.load(at + column, mask=column < COLUMNS, other=0.0, eviction_policy=policy)


@triton.jit
def first_tiles(
    weight_at,
    COLUMNS: tl.constexpr,
    REQUESTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The first tiles of the weight [ROWS, BLOCK_K], and sums of nothing."""
    vector: tl.constexpr = 128 // weight_at.dtype.element_ty.primitive_bitwidth
    tiles, sums = (), ()
    for step in tl.static_range(STAGES):
        if step * BLOCK_K < COLUMNS:
            tiles = tiles + (load_columns(weight_at, step, COLUMNS, BLOCK_K, True),)
    for _request in tl.static_range(REQUESTS):
        sums = sums + (tl.zeros((ROWS, BLOCK_K // vector), tl.float32),)
    return tiles, sums


@triton.jit
def next_tiles(tiles, weight_at, step: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tiles without the first, and with the step-th, if there is one."""
    if step * BLOCK_K < COLUMNS:
        return tiles[1:] + (load_columns(weight_at, step, COLUMNS, BLOCK_K, True),)
    else:
        return tiles[1:]


@triton.jit
def add_products(sums, weight, x, REQUESTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """For each request its sums [ROWS, BLOCK_K / V] and those of the weight's tile times its x [1, BLOCK_K], over the V
    columns that come as 16 bytes."""
    vector: tl.constexpr = 128 // weight.dtype.primitive_bitwidth
    wide, more = weight.to(tl.float32), ()
    for request in tl.static_range(REQUESTS):
        products = tl.reshape(wide * x[request], (ROWS, BLOCK_K // vector, vector))
        more = more + (sums[request] + tl.sum(products, axis=2),)
    return more
