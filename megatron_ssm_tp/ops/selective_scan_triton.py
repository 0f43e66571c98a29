"""The prefill kernels of selective_scan.py: a thread holds two channels and all N states of each, and walks through time.

States are tiles [N, LANES], one of each parity of channels (lanes_triton.py). As long as a warp's 32 lanes are channels
a state never leaves its register, sums over N need no other thread, and B and C, in float32, are read 16 bytes at a
time.

In `starts` [slots, N, D] the first slot of a sequence of several chunks holds its initial state, the next ones what
each earlier chunk leaves of its own tokens; in `steps` [slots, D] stands the sum of that chunk's dt, of which A makes
its decay.

What travels between functions in tuples:

    rows    of x, dt (and z, y): addresses of a token; strides by the token
    shared  of B (and C): the same
    planes  A * log2(e) [N, LANES], D [LANES], dt_bias [LANES], pairs
    lanes   each lane's first channel [LANES], which channels are (a pair of [LANES]), d_state
"""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E, exp2_rows, silu, softplus
from .lanes_triton import channels_of, chunk_of, load_row, pair_of, split_row, store_row

_FADED = tl.constexpr(-32.0)  # log2 of a decay after which float32 shows nothing of a state
_NO_CHANNEL = tl.constexpr(-1e30)  # A where there is none: fades at once


@triton.jit
def chunk_states(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
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
    x_stride,
    dt_stride,
    B_stride,
    B_head_stride,
    state_stride,
    N: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUPS: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What every chunk but a sequence's last leaves of its own tokens; the first also saves the initial state."""
    head, pair, mask = channels_of(tl.program_id(0), head_channels, head_blocks, LANES)
    slot = tl.program_id(1)
    sequence, first, begin, tokens, last = chunk_of(cu_seqlens_ptr, sequences, slot, chunk, UNROLL)
    if (tokens > 0) & (last == 0):
        lanes = (pair, mask, d_state)
        start_at = starts_ptr + slot.to(tl.int64) * (d_state * channels)
        if slot == first:
            source = states_ptr + tl.load(slots_ptr + sequence).to(tl.int64) * state_stride
            for parity in tl.static_range(2):
                state = load_state(source, lanes, parity, d_state, 1, 0, N, LANES, 0.0)
                _store_state(start_at, state, lanes, parity, 1, channels, 0, N, LANES)
        tail = begin + tokens - UNROLL
        rows = (x_ptr + tail * x_stride, dt_ptr + tail * dt_stride, x_stride, dt_stride)
        shared = (B_ptr + tail * B_stride + head * B_head_stride, B_stride)
        A = ()
        for group in tl.static_range(GROUPS):
            for parity in tl.static_range(2):
                part = load_state(
                    A_ptr, lanes, parity, d_state, 1, group * (N // GROUPS), N // GROUPS, LANES, _NO_CHANNEL
                )
                A = A + (part * LOG2E,)
        planes = (A, pair_of(dt_bias_ptr, pair, mask))
        sums, steps = _walk_back(rows, shared, planes, lanes, tokens, N, LANES, UNROLL, GROUPS, POLYNOMIAL, MASKED)
        for parity in tl.static_range(2):
            tl.store(steps_ptr + (slot + 1).to(tl.int64) * channels + pair + parity, steps[parity], mask=mask[parity])
            for group in tl.static_range(GROUPS):
                at, row = start_at + d_state * channels, group * (N // GROUPS)
                _store_state(at, sums[2 * group + parity], lanes, parity, 1, channels, row, N // GROUPS, LANES)


@triton.jit
def _walk_back(
    rows,
    shared,
    planes,
    lanes,
    tokens,
    N: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUPS: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The sum over tokens of exp(A * dt after it) dt B x, by groups of rows and parity, and the sum of dt, a pair.

    From the last token to the first: a token's weight is one exponential of A times the dt after it, tokens do not wait
    for each other, and the walk ends where a chunk's earlier tokens are forgotten: for each of GROUPS of rows by
    itself, of which the later ones, as A is initialized, forget sooner. The sum of dt then lacks what no longer counts.
    """
    x_at, dt_at, x_stride, dt_stride = rows
    B_at, B_stride = shared
    A, bias = planes
    pair, mask, d_state = lanes
    GROUP: tl.constexpr = N // GROUPS
    n = tl.arange(0, GROUP)
    sums, after = (), (tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32))
    for _ in tl.static_range(2 * GROUPS):
        sums = sums + (tl.zeros((GROUP, LANES), tl.float32),)
    left = tokens
    while left > 0:
        inputs = ()
        for i in tl.static_range(UNROLL):
            back = UNROLL - 1 - i
            x = load_row(x_at + back * x_stride, pair, mask, True, MASKED)
            inputs = inputs + ((x, load_row(dt_at + back * dt_stride, pair, mask, True, MASKED)),)
        weights, afters = (), ()
        for i in tl.static_range(UNROLL):
            x, dt = split_row(inputs[i][0]), split_row(inputs[i][1])
            step = (softplus(dt[0] + bias[0]), softplus(dt[1] + bias[1]))
            weights, afters = weights + ((step[0] * x[0], step[1] * x[1]),), afters + (after,)
            after = (after[0] + step[0], after[1] + step[1])
        left = tl.where(left > UNROLL, left - UNROLL, 0)
        alive, new_sums = 0, ()
        for group in tl.static_range(GROUPS):
            s0, s1 = sums[2 * group], sums[2 * group + 1]
            A0, A1 = A[2 * group], A[2 * group + 1]
            kept = tl.maximum(A0 * afters[0][0][None, :], A1 * afters[0][1][None, :])
            if tl.max(tl.max(kept, axis=0), axis=0) > _FADED:
                alive = 1
                for i in tl.static_range(UNROLL):
                    B = _shared_row(B_at + (UNROLL - 1 - i) * B_stride, group * GROUP + n, d_state, MASKED)
                    u0, u1 = weights[i]
                    s0 += exp2_rows(A0 * afters[i][0][None, :], n, POLYNOMIAL) * (u0[None, :] * B[:, None])
                    s1 += exp2_rows(A1 * afters[i][1][None, :], n, POLYNOMIAL) * (u1[None, :] * B[:, None])
            new_sums = new_sums + (s0, s1)
        sums = new_sums
        left = left * alive
        x_at -= UNROLL * x_stride
        dt_at -= UNROLL * dt_stride
        B_at -= UNROLL * B_stride
    return sums, after


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
    x_stride,
    dt_stride,
    z_stride,
    B_stride,
    B_head_stride,
    C_stride,
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
                _store_state(cached_at, h[parity], lanes, parity, d_state, 1, 0, N, LANES)


@triton.jit
def _state_before(
    starts_ptr, steps_ptr, A, first, slot, lanes, parity, channels, N: tl.constexpr, LANES: tl.constexpr
):
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
    if AHEAD:
        later = _rows(x_at, dt_at, z_at, x_stride, dt_stride, z_stride, lanes, tokens > 0, UNROLL, MASKED)
    for token in range(0, tokens, UNROLL):
        if AHEAD:
            now = later
        else:
            now = _rows(x_at, dt_at, z_at, x_stride, dt_stride, z_stride, lanes, True, UNROLL, MASKED)
        x_at += UNROLL * x_stride
        dt_at += UNROLL * dt_stride
        z_at += UNROLL * z_stride
        if AHEAD:
            more = token + UNROLL < tokens
            later = _rows(x_at, dt_at, z_at, x_stride, dt_stride, z_stride, lanes, more, UNROLL, MASKED)
        for i in tl.static_range(UNROLL):
            B, C = _shared_row(B_at, n, lanes[2], MASKED), _shared_row(C_at, n, lanes[2], MASKED)
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
def _rows(
    x_at, dt_at, z_at, x_stride, dt_stride, z_stride, lanes, there, UNROLL: tl.constexpr, MASKED: tl.constexpr
):
    """x, dt and z of UNROLL tokens, as they come."""
    found = ()
    for i in tl.static_range(UNROLL):
        x = load_row(x_at + i * x_stride, lanes[0], lanes[1], there, MASKED)
        dt = load_row(dt_at + i * dt_stride, lanes[0], lanes[1], there, MASKED)
        found = found + ((x, dt, load_row(z_at + i * z_stride, lanes[0], lanes[1], there, MASKED)),)
    return found


@triton.jit
def _shared_row(at, n, d_state, MASKED: tl.constexpr):
    """B or C of a token, float32 [N]."""
    if MASKED:
        return tl.load(at + n, mask=n < d_state, other=0.0).to(tl.float32)
    else:
        return tl.load(at + n).to(tl.float32)


@triton.jit
def load_state(
    at, lanes, parity, channel_stride, row_stride, row, N: tl.constexpr, LANES: tl.constexpr, other: tl.constexpr
):
    """Rows `row` .. row + N of a state, or of A, of the channels of one parity: float32 [N, LANES]."""
    address, inside = _in_state(at, lanes, parity, channel_stride, row_stride, row, N, LANES)
    return tl.load(address, mask=inside, other=other).to(tl.float32)


@triton.jit
def _store_state(
    at, state, lanes, parity, channel_stride, row_stride, row, N: tl.constexpr, LANES: tl.constexpr
):
    address, inside = _in_state(at, lanes, parity, channel_stride, row_stride, row, N, LANES)
    tl.store(address, state.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _in_state(at, lanes, parity, channel_stride, row_stride, row, N: tl.constexpr, LANES: tl.constexpr):
    pair, mask, d_state = lanes
    n = row + tl.arange(0, N)
    address = at + (pair + parity)[None, :] * channel_stride + n[:, None] * row_stride
    # Said to follow each other from lane to lane, one value each (which is harmless): a load then keeps a column in one
    # thread, instead of spreading it for the sake of wider loads.
    address = tl.max_contiguous(tl.multiple_of(address, [4, 4]), [1, LANES])
    return address, (n < d_state)[:, None] & mask[parity][None, :]
