"""The kernel of selective_scan.py that computes y: a thread holds two channels with all their states and walks in time.

States are tiles [N, LANES], one of each parity of channels (lanes_triton.py). As long as a warp's 32 lanes are channels
a state never leaves its register, sums over N need no other thread, and B and C, in float32, are read 16 bytes at a
time. Strides by the token are constants: the addresses of UNROLL tokens are then one address and offsets.

What travels between functions in tuples:

    rows    of x, dt, z, y: addresses of a token; strides by the token
    shared  of B, C: the same
    planes  pairs of A * log2(e) [N, LANES], D [LANES], dt_bias [LANES]
    lanes   each lane's first channel [LANES], which channels are (a pair of [LANES]), d_state
"""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E, exp2_rows, silu, softplus
from .lanes_triton import (
    channels_of,
    chunk_of,
    load_row,
    load_state,
    pair_of,
    shared_row,
    split_row,
    store_row,
    store_state,
)


@triton.jit
def scan_chunks(
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
    cu_seqlens_ptr,
    starts_ptr,
    steps_ptr,
    sequences,
    channels,
    head_channels,
    head_blocks,
    d_state,
    chunk,
    x_stride: tl.constexpr,
    dt_stride: tl.constexpr,
    z_stride: tl.constexpr,
    B_stride: tl.constexpr,
    B_head_stride,
    C_stride: tl.constexpr,
    C_head_stride,
    state_stride,
    N: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    AHEAD: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """y of every chunk, from the state that the chunks before it leave; the last one's state goes to the cache."""
    head, pair, mask = channels_of(tl.program_id(0), head_channels, head_blocks, LANES)
    slot = tl.program_id(1)
    sequence, first, begin, tokens, last = chunk_of(cu_seqlens_ptr, sequences, slot, chunk, UNROLL)
    if tokens > 0:
        lanes = (pair, mask, d_state)
        cached_at = states_ptr + tl.load(slots_ptr + sequence).to(tl.int64) * state_stride
        A, h = (), ()
        for parity in tl.static_range(2):
            A_plane = load_state(A_ptr, lanes, parity, d_state, 1, 0, N, LANES, 0.0) * LOG2E
            if last & (slot == first):
                state = load_state(cached_at, lanes, parity, d_state, 1, 0, N, LANES, 0.0)
            else:
                state = _state_before(starts_ptr, steps_ptr, A_plane, first, slot, lanes, parity, channels, N, LANES)
            A, h = A + (A_plane,), h + (state,)
        x_at, dt_at = x_ptr + begin * x_stride, dt_ptr + begin * dt_stride
        z_at, out_at = z_ptr + begin * z_stride, out_ptr + begin * channels
        rows = (x_at, dt_at, z_at, out_at, x_stride, dt_stride, z_stride, channels)
        B_at, C_at = B_ptr + begin * B_stride + head * B_head_stride, C_ptr + begin * C_stride + head * C_head_stride
        shared = (B_at, C_at, B_stride, C_stride)
        planes = (A, pair_of(D_ptr, pair, mask), pair_of(dt_bias_ptr, pair, mask))
        whole = tokens // UNROLL * UNROLL
        h, rows, shared = _scan(h, rows, shared, planes, lanes, whole, N, UNROLL, AHEAD, POLYNOMIAL, MASKED)
        h, rows, shared = _scan(h, rows, shared, planes, lanes, tokens - whole, N, 1, False, POLYNOMIAL, MASKED)
        if last:
            for parity in tl.static_range(2):
                store_state(cached_at, h[parity], lanes, parity, d_state, 1, 0, N, LANES)


@triton.jit
def _state_before(starts_ptr, steps_ptr, A, first, slot, lanes, parity, channels, N: tl.constexpr, LANES: tl.constexpr):
    """The state [N, LANES] at a chunk's start."""
    pair, mask, d_state = lanes
    at, steps_at = starts_ptr + first.to(tl.int64) * (d_state * channels), steps_ptr + first.to(tl.int64) * channels
    state = load_state(at, lanes, parity, 1, channels, 0, N, LANES, 0.0)
    for _ in range(first, slot):
        at += d_state * channels
        steps_at += channels
        own = load_state(at, lanes, parity, 1, channels, 0, N, LANES, 0.0)
        steps = tl.load(steps_at + pair + parity, mask=mask[parity], other=0.0)
        state = tl.exp2(A * steps[None, :]) * state + own
    return state


@triton.jit
def _scan(
    h,
    rows,
    shared,
    planes,
    lanes,
    tokens,
    N: tl.constexpr,
    UNROLL: tl.constexpr,
    AHEAD: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Store y of `tokens`, a multiple of UNROLL. AHEAD: rows are loaded UNROLL tokens before they are needed."""
    x_at, dt_at, z_at, out_at, x_stride, dt_stride, z_stride, out_stride = rows
    B_at, C_at, B_stride, C_stride = shared
    A, D, bias = planes
    n = tl.arange(0, N)
    later = ()
    if AHEAD:
        later = _rows(x_at, dt_at, z_at, x_stride, dt_stride, z_stride, lanes, tokens > 0, UNROLL, MASKED)
    for token in range(0, tokens, UNROLL):
        now = later
        if not AHEAD:
            now = _rows(x_at, dt_at, z_at, x_stride, dt_stride, z_stride, lanes, True, UNROLL, MASKED)
        x_at += UNROLL * x_stride
        dt_at += UNROLL * dt_stride
        z_at += UNROLL * z_stride
        if AHEAD:
            more = token + UNROLL < tokens
            later = _rows(x_at, dt_at, z_at, x_stride, dt_stride, z_stride, lanes, more, UNROLL, MASKED)
        for i in tl.static_range(UNROLL):
            B, C = shared_row(B_at, n, lanes[2], MASKED), shared_row(C_at, n, lanes[2], MASKED)
            x, dt, z = split_row(now[i][0]), split_row(now[i][1]), split_row(now[i][2])
            new_h, y = (), ()
            for parity in tl.static_range(2):
                step = softplus(dt[parity] + bias[parity])
                decay = exp2_rows(step[None, :] * A[parity], n, POLYNOMIAL)
                state = decay * h[parity] + (step * x[parity])[None, :] * B[:, None]
                seen = tl.sum(state * C[:, None], axis=0) + D[parity] * x[parity]
                new_h, y = new_h + (state,), y + (seen * silu(z[parity]),)
            h = new_h
            store_row(out_at, lanes[0], y[0], y[1], lanes[1], MASKED)
            out_at += out_stride
            B_at += B_stride
            C_at += C_stride
    return h, (x_at, dt_at, z_at, out_at, x_stride, dt_stride, z_stride, out_stride), (B_at, C_at, B_stride, C_stride)


@triton.jit
def _rows(x_at, dt_at, z_at, x_stride, dt_stride, z_stride, lanes, there, UNROLL: tl.constexpr, MASKED: tl.constexpr):
    """x, dt and z of UNROLL tokens, as they come."""
    found = ()
    for i in tl.static_range(UNROLL):
        x = load_row(x_at + i * x_stride, lanes[0], lanes[1], there, MASKED)
        dt = load_row(dt_at + i * dt_stride, lanes[0], lanes[1], there, MASKED)
        found = found + ((x, dt, load_row(z_at + i * z_stride, lanes[0], lanes[1], there, MASKED)),)
    return found
