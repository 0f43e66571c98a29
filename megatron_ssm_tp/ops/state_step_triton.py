"""The decode kernel of selective_scan.py: one token a request; the states are read and written once, in their order."""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E, silu, softplus
from .overlap_triton import await_inputs


@triton.jit
def state_step(
    x_ptr,
    dt_ptr,
    z_ptr,
    out_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    dt_bias_ptr,
    states_ptr,
    slots_ptr,
    channels,
    heads,
    head_channels,
    head_blocks,
    d_state,
    x_stride,
    dt_stride,
    z_stride,
    B_stride,
    B_head_stride,
    C_stride,
    C_head_stride,
    state_stride,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    AT_REST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program takes CHANNELS channels of a head, of one request. AT_REST: states and slots are read before what the
    kernel before writes is waited for."""
    if not AT_REST:
        await_inputs(OVERLAPS)
    head, request = tl.program_id(0) // head_blocks, tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) % head_blocks * CHANNELS + tl.arange(0, CHANNELS)
    mask = within < head_channels
    d, n = head * head_channels + within, tl.arange(0, N)
    here = mask[:, None] & (n < d_state)[None, :]
    element = d[:, None] * d_state + n[None, :]
    slot = tl.load(slots_ptr + request).to(tl.int64)
    own = here & (slot >= 0)  # Megatron pads batches with slots of -1
    state_at = states_ptr + slot * state_stride + element
    state = tl.load(state_at, mask=own, other=0.0).to(tl.float32)
    if AT_REST:
        await_inputs(OVERLAPS)
    A = tl.load(A_ptr + element, mask=here, other=0.0) * LOG2E
    B_at, C_at = B_ptr + request * B_stride + head * B_head_stride, C_ptr + request * C_stride + head * C_head_stride
    B = tl.load(B_at + n, mask=n < d_state, other=0.0).to(tl.float32)
    C = tl.load(C_at + n, mask=n < d_state, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + request * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + request * dt_stride + d, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + request * z_stride + d, mask=mask, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + d, mask=mask, other=0.0).to(tl.float32)
    dt += tl.load(dt_bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    state, y = advance(state, x, dt, A, B, C, D, z)
    tl.store(state_at, state.to(states_ptr.dtype.element_ty), mask=own)
    tl.store(out_ptr + request * channels + d, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def advance(state, x, dt, A, B, C, D, z):
    """A token: the state [CHANNELS, N] after it, and y [CHANNELS]. dt before its softplus, A times log2(e)."""
    step = softplus(dt)
    state = tl.exp2(step[:, None] * A) * state + (step * x)[:, None] * B[None, :]
    return state, (tl.sum(state * C[None, :], axis=1) + D * x) * silu(z)
