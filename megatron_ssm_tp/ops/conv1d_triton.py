"""The kernels of conv1d.py: a tile of tokens and channels is the sum of WIDTH tiles of inputs, each a token later."""

import triton
import triton.language as tl

from .elementwise_triton import silu
from .lanes_triton import sequence_of


@triton.jit
def conv1d_chunks(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    states_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    sequences,
    channels,
    x_stride,
    state_stride,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """TOKENS tokens of a sequence. The program of its first ones reads its state and writes the new one: no other."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    slot = tl.program_id(1)
    sequence, first, begin, length = sequence_of(cu_seqlens_ptr, sequences, slot, TOKENS)
    token = (slot - first) * TOKENS + tl.arange(0, TOKENS)
    if (slot - first) * TOKENS < length:
        x_ptr += begin * x_stride
        state_at = states_ptr + tl.load(slots_ptr + sequence).to(tl.int64) * state_stride + d * WIDTH
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)[None, :]
        for tap in tl.static_range(WIDTH):
            source = token + (tap - WIDTH + 1)
            own = ((source >= 0) & (source < length))[:, None] & mask[None, :]
            x = tl.load(x_ptr + source.to(tl.int64)[:, None] * x_stride + d[None, :], mask=own, other=0.0).to(
                tl.float32
            )
            if slot == first:
                before = (source < 0)[:, None] & mask[None, :]
                at = state_at[None, :] + (WIDTH + source)[:, None]
                x += tl.load(at, mask=before, other=0.0).to(tl.float32)
            total += x * tl.load(weight_ptr + d * WIDTH + tap, mask=mask, other=0.0).to(tl.float32)[None, :]
        at = out_ptr + (begin + token)[:, None] * channels + d[None, :]
        tl.store(at, silu(total).to(out_ptr.dtype.element_ty), mask=(token < length)[:, None] & mask[None, :])
        if slot == first:
            tl.debug_barrier()  # all threads have read the state
            _store_last(x_ptr, x_stride, d, mask, state_at, length, WIDTH)


@triton.jit
def _store_last(x_ptr, x_stride, d, mask, state_at, length, WIDTH: tl.constexpr):
    """The last WIDTH inputs of a sequence to its state, which may hold some of them: from the first on, so that none is
    overwritten before it has moved."""
    for column in tl.static_range(WIDTH):
        source = length - WIDTH + column
        if source >= 0:
            value = tl.load(x_ptr + source.to(tl.int64) * x_stride + d, mask=mask, other=0.0)
            tl.store(state_at + column, value.to(state_at.dtype.element_ty), mask=mask)
        else:
            tl.store(state_at + column, tl.load(state_at + (WIDTH + source), mask=mask, other=0.0), mask=mask)


@triton.jit
def conv1d_step(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    states_ptr,
    slots_ptr,
    channels,
    x_stride,
    state_stride,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One token of one request."""
    d, request = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1).to(tl.int64)
    mask = d < channels
    state_at = states_ptr + tl.load(slots_ptr + request).to(tl.int64) * state_stride + d * WIDTH
    x = tl.load(x_ptr + request * x_stride + d, mask=mask, other=0.0)
    total = tl.zeros((CHANNELS,), tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    for tap in tl.static_range(WIDTH):
        if tap + 1 < WIDTH:
            value = tl.load(state_at + (tap + 1), mask=mask, other=0.0)
        else:
            value = x.to(state_at.dtype.element_ty)
        tl.store(state_at + tap, value, mask=mask)
        value = x if tap + 1 == WIDTH else value
        total += value.to(tl.float32) * tl.load(weight_ptr + d * WIDTH + tap, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + request * channels + d, silu(total).to(out_ptr.dtype.element_ty), mask=mask)
