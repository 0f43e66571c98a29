"""The kernel of selective_scan.py: a thread holds two channels with all their states and walks in time.

States are tiles [N, LANES], one of each parity of channels (lanes_triton.py). As long as a warp's 32 lanes are channels
a state never leaves its register and sums over N need no other thread. What a warp waits for is loaded some FOUR tokens
ahead, into shared memory: x, dt and z, a word a lane and token, and B and C, which all lanes read from there 16 bytes
at a time.

Launched twice for prompts that are cut: first for what each chunk leaves of its own tokens (STATES_ONLY), then for y.
In `starts` [slots, N, D] the first slot of a sequence of several chunks holds its initial state, the next ones what
each earlier chunk leaves; in `steps` [slots, D] stands the sum of that chunk's dt, of which A makes its decay.

What travels between functions in tuples:

    rows    of x, dt, z, y: addresses of a chunk's first token; strides by the token
    planes  pairs of A * log2(e) [N, LANES], D [LANES], dt_bias [LANES]
    lanes   each lane's first channel [LANES], which channels are (a pair of [LANES]), d_state
"""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E, exp2_rows, silu, softplus
from .lanes_triton import channels_of, chunk_of, load_state, pair_of, store_state

FOUR = tl.constexpr(4)  # tokens that are loaded, and computed, together


@triton.jit(do_not_specialize=["sequences", "chunk"])
def scan_chunks(
    x_ptr,
    dt_ptr,
    z_ptr,
    out_ptr,
    A_ptr,
    BC_ptr,
    D_ptr,
    dt_bias_ptr,
    states_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    steps_ptr,
    sequences,
    channels,
    heads,
    head_channels,
    head_blocks,
    d_state,
    chunk,
    x_stride,
    dt_stride,
    z_stride,
    state_stride,
    N: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MASKED: tl.constexpr,
    STATES_ONLY: tl.constexpr,
    ONE_EACH: tl.constexpr,
):
    """y of every chunk, from the state that the ones before it leave; a sequence's last one's state goes to the cache.

    STATES_ONLY: what every chunk but a sequence's last leaves of its own tokens; the first also saves what it starts
    from. A program takes ONE_EACH, where the host knows how many there are, or chunks in turn. Were there a program for
    each that there might be, those that find none would leave some multiprocessors with much more work than others.
    The loop costs registers, and with them time.
    """
    tensors = (x_ptr, dt_ptr, z_ptr, out_ptr, A_ptr, BC_ptr, D_ptr, dt_bias_ptr, states_ptr, slots_ptr, cu_seqlens_ptr)
    tensors = tensors + (starts_ptr, steps_ptr)
    sizes = (sequences, channels, heads, head_channels, head_blocks, d_state, chunk)
    strides = (x_stride, dt_stride, z_stride, state_stride)
    slot = tl.program_id(1)
    if ONE_EACH:
        _scan_chunk(slot, tensors, sizes, strides, N, LANES, STAGES, POLYNOMIAL, MASKED, STATES_ONLY)
    else:
        slots = slot + 1
        while slot < slots:
            slots = _scan_chunk(slot, tensors, sizes, strides, N, LANES, STAGES, POLYNOMIAL, MASKED, STATES_ONLY)
            slot += tl.num_programs(1)


@triton.jit
def _scan_chunk(
    slot,
    tensors,
    sizes,
    strides,
    N: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MASKED: tl.constexpr,
    STATES_ONLY: tl.constexpr,
):
    """The slot's chunk, if there is one; how many slots have chunks: the first ones."""
    x_ptr, dt_ptr, z_ptr, out_ptr, A_ptr, BC_ptr, D_ptr, dt_bias_ptr, states_ptr, slots_ptr, cu_seqlens_ptr = tensors[
        :11
    ]
    starts_ptr, steps_ptr = tensors[11:]
    sequences, channels, heads, head_channels, head_blocks, d_state, chunk = sizes
    x_stride, dt_stride, z_stride, state_stride = strides
    head, pair, mask = channels_of(tl.program_id(0), head_channels, head_blocks, LANES)
    lanes = (pair, mask, d_state)
    sequence, first, begin, tokens, last, slots = chunk_of(cu_seqlens_ptr, sequences, slot, chunk, FOUR)
    if STATES_ONLY:
        tokens = tl.where(last, 0, tokens)
    if tokens > 0:
        cached_at = states_ptr + tl.load(slots_ptr + sequence).to(tl.int64) * state_stride
        start_at = starts_ptr + slot.to(tl.int64) * (d_state * channels)
        A, h = (), ()
        for parity in tl.static_range(2):
            plane = load_state(A_ptr, lanes, parity, d_state, 1, N, LANES) * LOG2E
            if STATES_ONLY:
                state = tl.zeros((N, LANES), tl.float32)
                if slot == first:
                    cached = load_state(cached_at, lanes, parity, d_state, 1, N, LANES)
                    store_state(start_at, cached, lanes, parity, 1, channels, N, LANES)
            elif last & (slot == first):
                state = load_state(cached_at, lanes, parity, d_state, 1, N, LANES)
            else:
                state = _state_before(starts_ptr, steps_ptr, plane, first, slot, lanes, parity, channels, N, LANES)
            A, h = A + (plane,), h + (state,)
        rows = (x_ptr + begin * x_stride, dt_ptr + begin * dt_stride, z_ptr + begin * z_stride)
        rows = rows + (out_ptr + begin * channels, x_stride, dt_stride, z_stride, channels)
        BC_at = BC_ptr + (begin * heads + head) * (2 * N)
        planes = (A, pair_of(D_ptr, pair, mask), pair_of(dt_bias_ptr, pair, mask))
        h, steps = scan_tokens(
            h, rows, BC_at, heads * 2 * N, planes, lanes, tokens, N, LANES, STAGES, POLYNOMIAL, MASKED, STATES_ONLY
        )
        for parity in tl.static_range(2):
            if STATES_ONLY:
                store_state(start_at + d_state * channels, h[parity], lanes, parity, 1, channels, N, LANES)
                at = steps_ptr + (slot + 1).to(tl.int64) * channels + pair + parity
                tl.store(at, steps[parity], mask=mask[parity])
            elif last:
                store_state(cached_at, h[parity], lanes, parity, d_state, 1, N, LANES)
    return slots


@triton.jit
def _state_before(starts_ptr, steps_ptr, A, first, slot, lanes, parity, channels, N: tl.constexpr, LANES: tl.constexpr):
    """The state [N, LANES] at a chunk's start."""
    pair, mask, d_state = lanes
    at, steps_at = starts_ptr + first.to(tl.int64) * (d_state * channels), steps_ptr + first.to(tl.int64) * channels
    state = load_state(at, lanes, parity, 1, channels, N, LANES)
    for _ in range(first, slot):
        at += d_state * channels
        steps_at += channels
        own = load_state(at, lanes, parity, 1, channels, N, LANES)
        steps = tl.load(steps_at + pair + parity, mask=mask[parity], other=0.0)
        state = tl.exp2(A * steps[None, :]) * state + own
    return state


@triton.jit
def scan_tokens(
    h,
    rows,
    BC_at,
    BC_stride,
    planes,
    lanes,
    tokens,
    N: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MASKED: tl.constexpr,
    STATES_ONLY: tl.constexpr,
):
    """The states after `tokens`, and the sums of their dt, a pair; stores y unless STATES_ONLY."""
    x_at, dt_at, z_at, out_at, x_stride, dt_stride, z_stride, out_stride = rows
    A, D, bias = planes
    # A state is the product of many decays, whose errors add up to more than float32's inputs are rounded by.
    FINE: tl.constexpr = x_at.dtype.element_ty.primitive_bitwidth == 32
    n = tl.arange(0, N)
    steps = (tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32))
    for token in tl.range(0, tokens, FOUR, num_stages=STAGES):
        left = tokens - token
        xs = _four_rows(x_at, x_stride, left, lanes, MASKED)
        dts = _four_rows(dt_at, dt_stride, left, lanes, MASKED)
        shared = _four_shared(BC_at, BC_stride, left, N, STATES_ONLY)
        # Addresses move on: a token's number times a stride may be more than int32 holds.
        x_at += FOUR * x_stride
        dt_at += FOUR * dt_stride
        BC_at += FOUR * BC_stride
        if not STATES_ONLY:
            zs = _four_rows(z_at, z_stride, left, lanes, MASKED)
            z_at += FOUR * z_stride
        for i in tl.static_range(FOUR):
            x, dt, there = _pair(xs[i]), _pair(dts[i]), i < left
            B = shared[i]
            if not STATES_ONLY:
                z = _pair(zs[i])
                B, C = tl.split(shared[i])
            new_h, new_steps, y = (), (), ()
            for parity in tl.static_range(2):
                step = tl.where(there, softplus(dt[parity] + bias[parity]), 0.0)
                decay = exp2_rows(step[None, :] * A[parity], n, POLYNOMIAL, FINE)
                state = decay * h[parity] + (step * x[parity])[None, :] * B[:, None]
                if STATES_ONLY:
                    new_steps = new_steps + (steps[parity] + step,)
                else:
                    seen = tl.sum(state * C[:, None], axis=0) + D[parity] * x[parity]
                    y = y + (seen * silu(z[parity]),)
                new_h = new_h + (state,)
            h = new_h
            if STATES_ONLY:
                steps = new_steps
            else:
                _store_row(out_at, y, there, lanes, MASKED)
                out_at += out_stride
    return h, steps


@triton.jit
def _four_rows(at, stride, left, lanes, MASKED: tl.constexpr):
    """Rows [LANES, 2] of four tokens, as they come; zeros where fewer are left."""
    pair, mask, d_state = lanes
    p = tl.arange(0, 2)
    place = 2 * p[None, None, :, None] + p[None, None, None, :]
    there = place < left
    if MASKED:
        there = there & tl.join(mask[0], mask[1])[:, :, None, None]
    address = at + (pair[:, None, None, None] + p[None, :, None, None]) + place * stride
    return _split_four(tl.load(address, mask=there, other=0.0))


@triton.jit
def _four_shared(at, stride, left, N: tl.constexpr, B_ONLY: tl.constexpr):
    """B and C [N, 2] of four tokens, or B [N]."""
    n, p = tl.arange(0, N), tl.arange(0, 2)
    if B_ONLY:
        place = 2 * p[None, :, None] + p[None, None, :]
        address = at + n[:, None, None] + place * stride
    else:
        place = 2 * p[None, None, :, None] + p[None, None, None, :]
        address = at + (n[:, None, None, None] + N * p[None, :, None, None]) + place * stride
    return _split_four(tl.load(address, mask=place < left, other=0.0))


@triton.jit
def _split_four(x):
    """[.., 2, 2] as the four of the last two axes."""
    even, odd = tl.split(x)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _pair(row):
    """A row [LANES, 2] as a pair, float32."""
    return tl.split(row.to(tl.float32))


@triton.jit
def _store_row(at, y, there, lanes, MASKED: tl.constexpr):
    pair, mask, d_state = lanes
    row = tl.join(y[0], y[1]).to(at.dtype.element_ty)
    if MASKED:
        there = tl.join(mask[0], mask[1]) & there
    tl.store(at + (pair[:, None] + tl.arange(0, 2)[None, :]), row, mask=there)
