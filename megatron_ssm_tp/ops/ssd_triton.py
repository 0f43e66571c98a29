"""The prefill kernel of ssd.py that computes y; ssd_states_triton.py has those before it.

Blocks of BLOCK tokens, counted from each sequence's start, are joined in products; a chunk is some blocks, of which
only a sequence's last may be short (lanes_triton.py). A program is one block of channels of one head, of one chunk; it
keeps that much of the state [P, N] in registers while it walks through the chunk. P and N are powers of two that hold
the block of channels and the state, MASKED says that they are more than these; factors of products are PRODUCTs. What
travels between functions in tuples:

    where    see ssd_tiles_triton.py
    rows     addresses of a token in x, B, C, y, and in dt and `total` of block_decays
    strides  of x, B, C, y, by the token
    sizes    channels from the block's first on, d_state
"""

import triton
import triton.language as tl

from .lanes_triton import chunk_of
from .ssd_states_triton import next_state, state_before
from .ssd_tiles_triton import load_decays, load_state, load_tile, store_state, store_tile


@triton.jit(do_not_specialize=["sequences", "chunk"])
def scan_chunks(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    out_ptr,
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
    C_stride,
    state_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_EACH: tl.constexpr,
):
    """y of every chunk, from the state that the chunks before it leave; the last one's state goes to the cache."""
    tensors = (
        x_ptr,
        B_ptr,
        C_ptr,
        D_ptr,
        out_ptr,
        step_ptr,
        total_ptr,
        states_ptr,
        slots_ptr,
        cu_seqlens_ptr,
        starts_ptr,
        decays_ptr,
    )
    sizes = (sequences, chunk, total_tokens, heads, group_heads, channels, channel_blocks, d_state)
    strides = (x_stride, B_stride, C_stride, state_stride)
    slot = tl.program_id(1)
    if ONE_EACH:
        _scan_chunk(slot, tensors, sizes, strides, P, N, BLOCK, MASKED, PRODUCT, PRECISION)
    else:
        slots = slot + 1
        while slot < slots:
            slots = _scan_chunk(slot, tensors, sizes, strides, P, N, BLOCK, MASKED, PRODUCT, PRECISION)
            slot += tl.num_programs(1)


@triton.jit
def _scan_chunk(
    slot,
    tensors,
    numbers,
    row_strides,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The slot's chunk, if there is one; how many slots have chunks: the first ones."""
    (
        x_ptr,
        B_ptr,
        C_ptr,
        D_ptr,
        out_ptr,
        step_ptr,
        total_ptr,
        states_ptr,
        slots_ptr,
        cu_seqlens_ptr,
        starts_ptr,
        decays_ptr,
    ) = tensors
    sequences, chunk, total_tokens, heads, group_heads, channels, channel_blocks, d_state = numbers
    x_stride, B_stride, C_stride, state_stride = row_strides
    head, p = tl.program_id(0) // channel_blocks, tl.program_id(0) % channel_blocks * P
    sequence, first, begin, tokens, last, slots = chunk_of(cu_seqlens_ptr, sequences, slot, chunk, BLOCK)
    if tokens > 0:
        where = (head, p, channels, d_state)
        cached_at = states_ptr + tl.load(slots_ptr + sequence).to(tl.int64) * state_stride
        if last & (slot == first):
            state = load_state(cached_at, where, P, N)
        else:
            state = state_before(starts_ptr, decays_ptr, first, slot, heads, where, P, N)
        shared, row = head // group_heads * d_state, head.to(tl.int64) * total_tokens + begin
        strides = (x_stride, B_stride, C_stride, heads * channels)
        x_at, out_at = (
            x_ptr + begin * x_stride + head * channels + p,
            out_ptr + (begin * heads + head) * channels + p,
        )
        B_at, C_at = B_ptr + begin * B_stride + shared, C_ptr + begin * C_stride + shared
        rows = (x_at, B_at, C_at, out_at, step_ptr + row, total_ptr + row)
        sizes, D = (channels - p, d_state), tl.load(D_ptr + head).to(tl.float32)
        whole = tokens // BLOCK * BLOCK
        state, rows = _scan(state, rows, strides, sizes, D, whole, P, N, BLOCK, True, MASKED, PRODUCT, PRECISION)
        left = tokens - whole
        state, rows = _scan(state, rows, strides, sizes, D, left, P, N, BLOCK, False, MASKED, PRODUCT, PRECISION)
        if last:
            store_state(cached_at, state, where, P, N)
    return slots


@triton.jit
def _scan(
    state,
    rows,
    strides,
    sizes,
    D,
    tokens,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store y of `tokens`: whole blocks, or less than one."""
    x_at, B_at, C_at, out_at, step_at, total_at = rows
    x_stride, B_stride, C_stride, out_stride = strides
    channels, d_state = sizes
    t = tl.arange(0, BLOCK)
    for _ in range(0, tokens, BLOCK):
        x = load_tile(x_at, x_stride, tokens, channels, BLOCK, P, WHOLE, MASKED)
        B = load_tile(B_at, B_stride, tokens, d_state, BLOCK, N, WHOLE, MASKED)
        C = load_tile(C_at, C_stride, tokens, d_state, BLOCK, N, WHOLE, MASKED).to(PRODUCT)
        step, total, end = load_decays(step_at, total_at, tokens, BLOCK, WHOLE)
        scores = tl.dot(C, tl.trans(B.to(PRODUCT)), input_precision=PRECISION)
        weights = scores * tl.exp2(total[:, None] - total[None, :]) * step[None, :]
        weights = tl.where(t[:, None] >= t[None, :], weights, 0.0).to(PRODUCT)
        y = tl.dot(C, tl.trans(state.to(PRODUCT)), input_precision=PRECISION) * tl.exp2(total)[:, None]
        y = tl.dot(weights, x.to(PRODUCT), y, input_precision=PRECISION) + D * x.to(tl.float32)
        store_tile(out_at, out_stride, y, tokens, channels, BLOCK, P, WHOLE, MASKED)
        state = next_state(state, x, B, step, total, end, PRODUCT, PRECISION)
        x_at += BLOCK * x_stride.to(tl.int64)
        B_at += BLOCK * B_stride.to(tl.int64)
        C_at += BLOCK * C_stride.to(tl.int64)
        out_at += BLOCK * out_stride.to(tl.int64)
        step_at += BLOCK
        total_at += BLOCK
    return state, (x_at, B_at, C_at, out_at, step_at, total_at)
