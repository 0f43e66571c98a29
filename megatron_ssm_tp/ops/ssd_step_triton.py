"""The decode kernel of ssd.py: one token a request; the states are read and written once, in their order."""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E, softplus
from .overlap_triton import await_inputs


@triton.jit
def ssd_state_step(
    x_ptr,
    dt_ptr,
    out_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    dt_bias_ptr,
    states_ptr,
    slots_ptr,
    heads,
    group_heads,
    channels,
    channel_blocks,
    d_state,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    state_stride,
    dt_min,
    dt_max,
    P: tl.constexpr,
    N: tl.constexpr,
    AT_REST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program takes P channels of a head, of one request. AT_REST: states and slots are read before what the kernel
    before writes is waited for."""
    if not AT_REST:
        await_inputs(OVERLAPS)
    head, request = tl.program_id(0) // channel_blocks, tl.program_id(1).to(tl.int64)
    p, n = tl.program_id(0) % channel_blocks * P + tl.arange(0, P), tl.arange(0, N)
    mask, channel = p < channels, head * channels + p
    slot = tl.load(slots_ptr + request).to(tl.int64)
    own = mask[:, None] & (n < d_state)[None, :] & (slot >= 0)  # Megatron pads batches with slots of -1
    state_at = states_ptr + slot * state_stride
    state_at += channel[:, None] * d_state + n[None, :]
    state = tl.load(state_at, mask=own, other=0.0).to(tl.float32)
    if AT_REST:
        await_inputs(OVERLAPS)
    shared = head // group_heads * d_state + n
    B = tl.load(B_ptr + request * B_stride + shared, mask=n < d_state, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + request * C_stride + shared, mask=n < d_state, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + request * x_stride + channel, mask=mask, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + request * dt_stride + head).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32)
    dt = tl.maximum(softplus(dt), dt_min, propagate_nan=tl.PropagateNan.ALL)
    dt = tl.minimum(dt, dt_max, propagate_nan=tl.PropagateNan.ALL)
    decay = tl.exp2(dt * (tl.load(A_ptr + head) * LOG2E))
    state = decay * state + (dt * x)[:, None] * B[None, :]
    y = tl.sum(state * C[None, :], axis=1) + tl.load(D_ptr + head).to(tl.float32) * x
    tl.store(state_at, state.to(states_ptr.dtype.element_ty), mask=own)
    tl.store(out_ptr + request * (heads * channels) + channel, y.to(out_ptr.dtype.element_ty), mask=mask)
