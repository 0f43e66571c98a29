"""bcdt.py as a Triton kernel: a program holds some rows of x_proj's product, read once."""

import torch
import triton
import triton.language as tl

from .kernel_calls import launch
from .launching import last_axis_dense
from .norm_triton import sum_of_parts, tile_of
from .overlap_triton import await_inputs


def split_bcdt(
    parts: torch.Tensor, dt_rank: int, d_state: int, eps: float | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """bcdt.split_bcdt."""
    before, columns = parts.shape[1:-1], parts.shape[-1]
    dt = torch.empty((*before, dt_rank), dtype=dtype, device=parts.device)
    bc = torch.empty((*before, 2 * d_state), dtype=torch.float32, device=parts.device)
    if not parts.numel():
        return dt, bc
    x = last_axis_dense(parts.reshape(-1, columns))
    rows = x.shape[0] // parts.shape[0]
    rows_at_a_time, width, warps = tile_of(columns)
    launch(
        split_rows,
        (-(-rows // rows_at_a_time),),
        (x, dt, bc),
        (rows, x.stride(0), eps or 0.0),
        PARTS=parts.shape[0],
        BOUNDS=(0, dt_rank, dt_rank + d_state, columns),
        NORMED=eps is not None,
        WIDTH=width,
        ROWS=rows_at_a_time,
        num_warps=warps,
    )
    return dt, bc


@triton.jit(do_not_specialize=["rows"])
def split_rows(
    x_ptr,
    dt_ptr,
    bc_ptr,
    rows,
    x_stride,
    eps,
    PARTS: tl.constexpr,
    BOUNDS: tl.constexpr,
    NORMED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows of dt, B and C between BOUNDS, the latter to float32; NORMED: rounded to dt's dtype before."""
    await_inputs(OVERLAPS)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows) & (column < BOUNDS[3])
    x = sum_of_parts(x_ptr + row * x_stride + column, mask, rows * x_stride, PARTS, dt_ptr.dtype.element_ty)
    if NORMED:
        wide = x.to(tl.float32)
        x = (wide * _scale(wide, column, eps, BOUNDS)).to(x.dtype)
    tl.store(dt_ptr + row * BOUNDS[1] + column, x, mask=mask & (column < BOUNDS[1]))
    at = bc_ptr + row * (BOUNDS[3] - BOUNDS[1]) + (column - BOUNDS[1])
    tl.store(at, x.to(tl.float32), mask=mask & (column >= BOUNDS[1]))


@triton.jit
def _scale(wide, column, eps, BOUNDS: tl.constexpr):
    """1 / rms of the run of columns that each value belongs to; values beyond the last run are zero."""
    squares, scale = wide * wide, tl.zeros_like(wide)
    for i in tl.static_range(3):
        run = (column >= BOUNDS[i]) & (column < BOUNDS[i + 1])
        mean = tl.sum(tl.where(run, squares, 0.0), axis=1, keep_dims=True) / (BOUNDS[i + 1] - BOUNDS[i])
        scale = tl.where(run, tl.rsqrt(mean + eps), scale)
    return scale
