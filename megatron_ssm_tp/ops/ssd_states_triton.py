"""The kernels of ssd.py that come before y: logarithms of decays, and what each chunk leaves in the state.

What programs, blocks and chunks are, and the tuples: see ssd_triton.py.
"""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E, softplus
from .lanes_triton import chunk_of, sequence_of
from .ssd_tiles_triton import load_decays, load_state, load_tile, store_state

# Nothing of float32 is left after it: a step that forgets more is cut here, or the sums that it is part of would lose
# the digits of all later steps.
_FORGOTTEN = tl.constexpr(-150.0)


@triton.jit(do_not_specialize=["sequences"])
def block_decays(
    dt_ptr,
    A_ptr,
    dt_bias_ptr,
    step_ptr,
    total_ptr,
    cu_seqlens_ptr,
    sequences,
    tokens,
    heads,
    dt_stride,
    dt_min,
    dt_max,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Of each token: dt as it counts, and `total`, log2 of the decay from before its block to it: float32 [H, T]."""
    slot = tl.program_id(1)
    sequence, first, begin, length = sequence_of(cu_seqlens_ptr, sequences, slot, BLOCK)
    done = (slot - first) * BLOCK
    if done < length:
        t, head = tl.arange(0, BLOCK), tl.program_id(0) * HEADS + tl.arange(0, HEADS)
        at, real = begin + done + t, head < heads
        mask = (t < length - done)[:, None] & real[None, :]
        dt = tl.load(dt_ptr + at[:, None] * dt_stride + head[None, :], mask=mask, other=0.0).to(tl.float32)
        dt += tl.load(dt_bias_ptr + head, mask=real, other=0.0).to(tl.float32)[None, :]
        dt = tl.maximum(softplus(dt), dt_min, propagate_nan=tl.PropagateNan.ALL)
        dt = tl.minimum(dt, dt_max, propagate_nan=tl.PropagateNan.ALL)
        decay = dt * (tl.load(A_ptr + head, mask=real, other=0.0) * LOG2E)[None, :]
        total = tl.cumsum(tl.maximum(decay, _FORGOTTEN, propagate_nan=tl.PropagateNan.ALL), axis=0)
        out = head[None, :].to(tl.int64) * tokens + at[:, None]
        tl.store(step_ptr + out, dt, mask=mask)
        tl.store(total_ptr + out, total, mask=mask)


@triton.jit(do_not_specialize=["sequences", "chunk"])
def chunk_states(
    x_ptr,
    B_ptr,
    step_ptr,
    total_ptr,
    states_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    decays_ptr,
    sequences,
    chunk,
    total_tokens,
    heads,
    group_heads,
    channels,
    channel_blocks,
    d_state,
    x_stride,
    B_stride,
    state_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_EACH: tl.constexpr,
):
    """What every chunk but a sequence's last leaves of its own tokens; the first also saves the initial state.

    In `starts` [slots, H, P, N] the first slot of a sequence of several chunks holds its initial state, the next ones
    what each earlier chunk leaves; in `decays` [slots, H] stands log2 of that chunk's decay.
    """
    tensors = (x_ptr, B_ptr, step_ptr, total_ptr, states_ptr, slots_ptr, cu_seqlens_ptr, starts_ptr, decays_ptr)
    sizes = (sequences, chunk, total_tokens, heads, group_heads, channels, channel_blocks, d_state)
    strides = (x_stride, B_stride, state_stride)
    slot = tl.program_id(1)
    if ONE_EACH:
        _chunk_state(slot, tensors, sizes, strides, P, N, BLOCK, MASKED, PRODUCT, PRECISION)
    else:
        slots = slot + 1
        while slot < slots:
            slots = _chunk_state(slot, tensors, sizes, strides, P, N, BLOCK, MASKED, PRODUCT, PRECISION)
            slot += tl.num_programs(1)


@triton.jit
def _chunk_state(
    slot,
    tensors,
    sizes,
    strides,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The slot's chunk, if there is one; how many slots have chunks: the first ones."""
    x_ptr, B_ptr, step_ptr, total_ptr, states_ptr, slots_ptr, cu_seqlens_ptr, starts_ptr, decays_ptr = tensors
    sequences, chunk, total_tokens, heads, group_heads, channels, channel_blocks, d_state = sizes
    x_stride, B_stride, state_stride = strides
    head, p = tl.program_id(0) // channel_blocks, tl.program_id(0) % channel_blocks * P
    sequence, first, begin, tokens, last, slots = chunk_of(cu_seqlens_ptr, sequences, slot, chunk, BLOCK)
    if (tokens > 0) & (last == 0):
        where, size = (head, p, channels, d_state), heads * channels * d_state
        start_at = starts_ptr + slot.to(tl.int64) * size
        if slot == first:
            cached_at = states_ptr + tl.load(slots_ptr + sequence).to(tl.int64) * state_stride
            store_state(start_at, load_state(cached_at, where, P, N), where, P, N)
        x_at = x_ptr + begin * x_stride + head * channels + p
        B_at = B_ptr + begin * B_stride + head // group_heads * d_state
        row = head.to(tl.int64) * total_tokens + begin
        step_at, total_at = step_ptr + row, total_ptr + row
        state, decay = tl.zeros((P, N), tl.float32), 0.0
        for _ in range(0, tokens, BLOCK):  # whole blocks: only a sequence's last chunk may end within one
            x = load_tile(x_at, x_stride, tokens, channels - p, BLOCK, P, True, MASKED)
            B = load_tile(B_at, B_stride, tokens, d_state, BLOCK, N, True, MASKED)
            step, total, end = load_decays(step_at, total_at, tokens, BLOCK, True)
            state = next_state(state, x, B, step, total, end, PRODUCT, PRECISION)
            decay += end
            x_at += BLOCK * x_stride.to(tl.int64)
            B_at += BLOCK * B_stride.to(tl.int64)
            step_at += BLOCK
            total_at += BLOCK
        store_state(start_at + size, state, where, P, N)
        # All channels of the head write the same.
        tl.store(decays_ptr + (slot + 1).to(tl.int64) * heads + head, decay)
    return slots


@triton.jit
def next_state(state, x, B, step, total, end, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """The state [P, N] after a block. x is what is weighted, not B: it is no wider, and B stays where it was loaded."""
    weighted = (x.to(tl.float32) * (tl.exp2(end - total) * step)[:, None]).to(PRODUCT)
    return tl.dot(tl.trans(weighted), B.to(PRODUCT), state * tl.exp2(end), input_precision=PRECISION)


@triton.jit
def state_before(starts_ptr, decays_ptr, first, slot, heads, where, P: tl.constexpr, N: tl.constexpr):
    """The state [P, N] at a chunk's start."""
    head, p, channels, d_state = where
    size = heads * channels * d_state
    at, decay_at = starts_ptr + first.to(tl.int64) * size, decays_ptr + first.to(tl.int64) * heads + head
    state = load_state(at, where, P, N)
    for _ in range(first, slot):
        at += size
        decay_at += heads
        state = tl.exp2(tl.load(decay_at)) * state + load_state(at, where, P, N)
    return state
