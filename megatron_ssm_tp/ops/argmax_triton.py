"""argmax.py's kernel: a program has a row."""

import torch
import triton
import triton.language as tl

from .kernel_calls import launch
from .launching import last_axis_dense
from .overlap_triton import await_inputs

BLOCK, WARPS = 16384, 32  # columns that a program looks at at a time: 16 a thread


def argmax_of_rows(x: torch.Tensor) -> torch.Tensor:
    """argmax.argmax_rows."""
    x = last_axis_dense(x)
    (rows, columns), out = x.shape, torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    if rows:
        launch(argmax_row, (rows,), (x, out), (x.stride(0), columns), BLOCK=BLOCK, num_warps=WARPS)
    return out


@triton.jit
def argmax_row(x_ptr, out_ptr, x_stride, columns, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """The place of a row's largest value."""
    await_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    _, place = largest_of(x_ptr + row * x_stride, columns, BLOCK)
    tl.store(out_ptr + row, place)


@triton.jit
def largest_of(x_ptr, columns, BLOCK: tl.constexpr):
    """The largest of so many values, float32, and the first place that it is at, int32."""
    within = tl.arange(0, BLOCK)
    largest, place = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, columns, BLOCK):
        x = tl.load(x_ptr + begin + within, mask=begin + within < columns, other=float("-inf")).to(tl.float32)
        place = tl.where(x > largest, begin + within, place)
        largest = tl.where(x > largest, x, largest)  # NaN is not, whatever a maximum makes of it
    value = tl.max(largest, axis=0)
    return value, tl.min(tl.where(largest == value, place, 0x7FFFFFFF), axis=0)
