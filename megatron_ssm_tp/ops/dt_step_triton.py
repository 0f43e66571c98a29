"""The kernel of dt_step.py."""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E
from .overlap_triton import await_inputs
from .state_step_triton import advance


@triton.jit
def dt_step(
    bcdt_ptr,
    x_ptr,
    z_ptr,
    out_ptr,
    weight_ptr,
    A_ptr,
    D_ptr,
    dt_bias_ptr,
    states_ptr,
    slots_ptr,
    channels,
    x_stride,
    z_stride,
    bcdt_stride,
    state_stride,
    eps,
    RANK: tl.constexpr,
    D_STATE: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    NORMED: tl.constexpr,
    AT_REST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program takes CHANNELS channels of one request. What does not wait for bcdt is loaded first: states and slots
    too, if they are AT_REST."""
    d, request = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1).to(tl.int64)
    mask, n, r = d < channels, tl.arange(0, N), tl.arange(0, R)
    weight_at = weight_ptr + d[:, None] * RANK + r[None, :]
    weight = tl.load(weight_at, mask=mask[:, None] & (r < RANK)[None, :], other=0.0)
    if not AT_REST:
        await_inputs(OVERLAPS)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    here = mask[:, None] & (n < D_STATE)[None, :]
    own = here & (slot >= 0)  # batches are padded with slots of -1
    element = d[:, None] * D_STATE + n[None, :]
    state_at = states_ptr + slot * state_stride + element
    state = tl.load(state_at, mask=own, other=0.0).to(tl.float32)
    if AT_REST:
        await_inputs(OVERLAPS)
    A = tl.load(A_ptr + element, mask=here, other=0.0) * LOG2E
    row = bcdt_ptr + request * bcdt_stride
    dt_low = _run(row, r, RANK, eps, NORMED)
    B, C = _run(row + RANK, n, D_STATE, eps, NORMED), _run(row + RANK + D_STATE, n, D_STATE, eps, NORMED)
    dt = tl.sum(weight.to(tl.float32) * dt_low[None, :], axis=1).to(x_ptr.dtype.element_ty).to(tl.float32)
    x = tl.load(x_ptr + request * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + request * z_stride + d, mask=mask, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + d, mask=mask, other=0.0).to(tl.float32)
    dt += tl.load(dt_bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    state, y = advance(state, x, dt, A, B, C, D, z)
    tl.store(state_at, state.to(states_ptr.dtype.element_ty), mask=own)
    tl.store(out_ptr + request * channels + d, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _run(at, index, LENGTH: tl.constexpr, eps, NORMED: tl.constexpr):
    """LENGTH values as float32, zeros behind them; NORMED: divided by their root mean square, rounded as they came."""
    values = tl.load(at + index, mask=index < LENGTH, other=0.0)
    wide = values.to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / LENGTH + eps)
        wide = (wide * scale).to(values.dtype).to(tl.float32)
    return wide
