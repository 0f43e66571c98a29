"""bcdt.py as a Triton kernel: a program holds some rows of x_proj's product, read once."""

import torch
import triton
import triton.language as tl

from .kernel_calls import launch
from .launching import last_axis_dense
from .norm_triton import tile_of


def split_bcdt(bcdt: torch.Tensor, dt_rank: int, d_state: int, eps: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """bcdt.split_bcdt."""
    before, columns = bcdt.shape[:-1], bcdt.shape[-1]
    dt = torch.empty((*before, dt_rank), dtype=bcdt.dtype, device=bcdt.device)
    bc = torch.empty((*before, 2 * d_state), dtype=torch.float32, device=bcdt.device)
    if not bcdt.numel():
        return dt, bc
    x = last_axis_dense(bcdt.reshape(-1, columns))
    rows_at_a_time, width, warps = tile_of(columns)
    launch(
        split_rows,
        (-(-x.shape[0] // rows_at_a_time),),
        (x, dt, bc),
        (x.shape[0], x.stride(0), eps or 0.0),
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
    BOUNDS: tl.constexpr,
    NORMED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of dt, B and C between BOUNDS, the latter to float32; NORMED: rounded to x's dtype before."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows) & (column < BOUNDS[3])
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)
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
