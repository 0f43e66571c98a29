"""The kernel of selective_scan.py that looks ahead: what each chunk of a prompt leaves in the state.

In `starts` [slots, N, D] the first slot of a sequence of several chunks holds its initial state, the next ones what
each earlier chunk leaves of its own tokens; in `steps` [slots, D] stands the sum of that chunk's dt, of which A makes
its decay. Tuples are those of selective_scan_triton.py; `planes` are by groups of rows.
"""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E, exp2_rows, softplus
from .lanes_triton import channels_of, chunk_of, load_row, load_state, pair_of, shared_row, split_row, store_state

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
    x_stride: tl.constexpr,
    dt_stride: tl.constexpr,
    B_stride: tl.constexpr,
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
                store_state(start_at, state, lanes, parity, 1, channels, 0, N, LANES)
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
                store_state(at, sums[2 * group + parity], lanes, parity, 1, channels, row, N // GROUPS, LANES)


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
                    B = shared_row(B_at + (UNROLL - 1 - i) * B_stride, group * GROUP + n, d_state, MASKED)
                    u0, u1 = weights[i]
                    s0 += exp2_rows(A0 * afters[i][0][None, :], group * GROUP + n, POLYNOMIAL) * (
                        u0[None, :] * B[:, None]
                    )
                    s1 += exp2_rows(A1 * afters[i][1][None, :], group * GROUP + n, POLYNOMIAL) * (
                        u1[None, :] * B[:, None]
                    )
            new_sums = new_sums + (s0, s1)
        sums = new_sums
        left = left * alive
        x_at -= UNROLL * x_stride
        dt_at -= UNROLL * dt_stride
        B_at -= UNROLL * B_stride
    return sums, after
