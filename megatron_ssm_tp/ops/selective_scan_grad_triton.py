"""Kernels of selective_scan_grad.py: forward over dense sequences, and what joins chunks, both ways.

A slot is a chunk: number c of sequence i has slot i * chunks + c. What the chunks do not know of each other is found
first, and after it all of them are independent:

    forward     each chunk's own state (from zero), joined to the states at chunks' starts; then outputs
    backward    each chunk's own carry (from zero), joined to the carries at chunks' ends; then gradients

Forward walks as inference does (selective_scan_triton.py), two channels a thread with all their states.
"""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E
from .lanes_triton import channels_of, load_state, pair_of, store_state
from .selective_scan_triton import scan_tokens


@triton.jit
def forward_chunks(
    x_ptr,
    dt_ptr,
    z_ptr,
    out_ptr,
    A_ptr,
    BC_ptr,
    D_ptr,
    dt_bias_ptr,
    states_ptr,
    steps_ptr,
    length,
    chunks,
    batch,
    channels,
    heads,
    head_channels,
    head_blocks,
    d_state,
    x_stride,
    x_token,
    dt_stride,
    dt_token,
    z_stride,
    z_token,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MASKED: tl.constexpr,
    STATES_ONLY: tl.constexpr,
):
    """STATES_ONLY: a chunk's own state, to `states` [slots, D, N], and sum of dt, to `steps` [slots, D]; else y, from
    the state in `states` at the chunk's start. BC [l, b, H, 2, N] and y [l, b, D] are dense; _stride is a sequence's,
    _token a token's.
    """
    slot = tl.program_id(0)
    head, pair, mask = channels_of(tl.program_id(1), head_channels, head_blocks, LANES)
    lanes = (pair, mask, d_state)
    sequence, begin = (slot // chunks).to(tl.int64), (slot % chunks).to(tl.int64) * CHUNK
    tokens = tl.minimum(length - begin, CHUNK).to(tl.int32)
    state_at = states_ptr + slot.to(tl.int64) * (channels * d_state)
    A, h = (), ()
    for parity in tl.static_range(2):
        A = A + (load_state(A_ptr, lanes, parity, d_state, 1, N, LANES) * LOG2E,)
        if STATES_ONLY:
            h = h + (tl.zeros((N, LANES), tl.float32),)
        else:
            h = h + (load_state(state_at, lanes, parity, d_state, 1, N, LANES),)
    rows = (x_ptr + sequence * x_stride + begin * x_token, dt_ptr + sequence * dt_stride + begin * dt_token)
    rows = rows + (z_ptr + sequence * z_stride + begin * z_token, out_ptr + (begin * batch + sequence) * channels)
    rows = rows + (x_token, dt_token, z_token, batch * channels)
    BC_at = BC_ptr + ((begin * batch + sequence) * heads + head) * (2 * N)
    BC_token = batch * heads * (2 * N)
    planes = (A, pair_of(D_ptr, pair, mask), pair_of(dt_bias_ptr, pair, mask))
    h, steps = scan_tokens(
        h, rows, BC_at, BC_token, planes, lanes, tokens, N, LANES, STAGES, POLYNOMIAL, MASKED, STATES_ONLY
    )
    if STATES_ONLY:
        for parity in tl.static_range(2):
            store_state(state_at, h[parity], lanes, parity, d_state, 1, N, LANES)
            at = steps_ptr + slot.to(tl.int64) * channels + pair + parity
            tl.store(at, steps[parity], mask=mask[parity])


@triton.jit
def join_chunks(
    edges_ptr,
    steps_ptr,
    A_ptr,
    first_ptr,
    last_ptr,
    chunks,
    channels,
    d_state,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`edges` [slots, D, N], in place: from what chunks leave of their own to what they begin with.

    `first` [b, D, N] is what the first begins with (None: zeros), `last` gets what the last leaves (None: nothing).
    REVERSE: chunks follow each other from a sequence's end to its start.
    """
    sequence = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size = channels * d_state
    mask = i < size
    A = tl.load(A_ptr + i, mask=mask, other=0.0) * LOG2E
    state = tl.zeros((BLOCK,), tl.float32)
    if first_ptr is not None:
        state += tl.load(first_ptr + sequence * size + i, mask=mask, other=0.0).to(tl.float32)
    for number in tl.range(0, chunks, num_stages=4):
        slot = sequence * chunks + (chunks - 1 - number if REVERSE else number)
        own = tl.load(edges_ptr + slot * size + i, mask=mask, other=0.0)
        steps = tl.load(steps_ptr + slot * channels + i // d_state, mask=mask, other=0.0)
        tl.store(edges_ptr + slot * size + i, state, mask=mask)
        state = tl.exp2(A * steps) * state + own
    if last_ptr is not None:
        tl.store(last_ptr + sequence * size + i, state.to(last_ptr.dtype.element_ty), mask=mask)
