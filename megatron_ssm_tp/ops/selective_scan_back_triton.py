"""Kernels of selective_scan_grad.py: backward over dense sequences, chunk by chunk (selective_scan_grad_triton.py).

With s = softplus(dt + dt_bias), a_t = exp(s_t A), seen_t = C_t h_t + D x_t and y_t = seen_t silu(z_t), a channel's:

    carry_t = a_{t+1} dh_{t+1}, what later tokens add        dseen_t = dy_t silu(z_t)
    dh_t = carry_t + dseen_t C_t                             dz_t = dy_t seen_t silu'(z_t)
    dB_t = sum over channels of s_t x_t dh_t                 dx_t = D dseen_t + s_t dh_t B_t
    dC_t = sum over channels of dseen_t h_t                  ds_t = sum over states of dh_t A a_t h_{t-1} + x_t dh_t B_t
    dA = sum over tokens of s_t dh_t a_t h_{t-1}             ddt_t = ds_t sigmoid(dt_t + dt_bias)

There are sums over states, a channel's, and over channels, a state's: a tile is [CHANNELS, N] with N the fast axis, so
that few threads share a channel, each has several, and no sum is far.
"""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E, sigmoid, softplus

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def carry_chunks(
    dt_ptr,
    z_ptr,
    dy_ptr,
    A_ptr,
    BC_ptr,
    dt_bias_ptr,
    carries_ptr,
    steps_ptr,
    length,
    chunks,
    batch,
    channels,
    heads,
    head_channels,
    head_blocks,
    d_state,
    dt_stride,
    dt_token,
    z_stride,
    z_token,
    dy_stride,
    dy_token,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """What a chunk's outputs add to the carry before it, to `carries` [slots, D, N]; its sum of dt to `steps`."""
    slot = tl.program_id(0)
    head = tl.program_id(1) // head_blocks
    d, mask = _channels(head, tl.program_id(1) % head_blocks, head_channels, CHANNELS)
    tile, inside = _tile(d, mask, d_state, N)
    n = tl.arange(0, N)
    sequence, begin = (slot // chunks).to(tl.int64), (slot % chunks).to(tl.int64) * CHUNK
    tokens = tl.minimum(length - begin, CHUNK).to(tl.int32)
    A = tl.load(A_ptr + tile, mask=inside, other=0.0) * LOG2E
    bias = tl.load(dt_bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    dt_at = dt_ptr + sequence * dt_stride + begin * dt_token + d
    z_at = z_ptr + sequence * z_stride + begin * z_token + d
    dy_at = dy_ptr + sequence * dy_stride + begin * dy_token + d
    C_at = BC_ptr + ((begin * batch + sequence) * heads + head) * (2 * N) + N + n
    carry, steps = tl.zeros((CHANNELS, N), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for back in range(0, tokens):
        t = tokens - 1 - back
        step = softplus(_row(dt_at, t * dt_token, mask) + bias)
        z = _row(z_at, t * z_token, mask)
        seen = _row(dy_at, t * dy_token, mask) * z * sigmoid(z)
        C = tl.load(C_at + t * (batch * heads * (2 * N)))
        carry = tl.exp2(step[:, None] * A) * (carry + seen[:, None] * C[None, :])
        steps += step
    tl.store(carries_ptr + slot.to(tl.int64) * (channels * d_state) + tile, carry, mask=inside)
    tl.store(steps_ptr + slot.to(tl.int64) * channels + d, steps, mask=mask)


@triton.jit
def backward_chunks(
    x_ptr,
    dt_ptr,
    z_ptr,
    dy_ptr,
    A_ptr,
    BC_ptr,
    D_ptr,
    dt_bias_ptr,
    starts_ptr,
    ends_ptr,
    scratch_ptr,
    dx_ptr,
    ddt_ptr,
    dz_ptr,
    dA_ptr,
    dBC_ptr,
    dD_ptr,
    dbias_ptr,
    length,
    chunks,
    batch,
    channels,
    heads,
    head_channels,
    head_blocks,
    groups,
    group_blocks,
    d_state,
    x_stride,
    x_token,
    dt_stride,
    dt_token,
    z_stride,
    z_token,
    dy_stride,
    dy_token,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of all chunks, from the states at their starts and the carries at their ends [slots, D, N].

    A program takes every so manieth item: a chunk's group of blocks of one head's channels, one after the other. dx,
    ddt, dz [l, b, D] are dense. Partial sums: dA [slots, D, N], dD and dbias [slots, D], dBC [groups, l, b, H, 2, N].
    """
    n = tl.arange(0, N)
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * ((CHUNK // SUB + SUB) * CHANNELS * N)
    for item in range(tl.program_id(0), chunks * batch * heads * groups, tl.num_programs(0)):
        group, head, slot = item % groups, item // groups % heads, item // groups // heads
        sequence, begin = (slot // chunks).to(tl.int64), (slot % chunks).to(tl.int64) * CHUNK
        tokens = tl.minimum(length - begin, CHUNK).to(tl.int32)
        row = begin * batch + sequence  # of dense [l, b, ..]
        BC_at = BC_ptr + (row * heads + head) * (2 * N) + n
        dBC_at = dBC_ptr + ((group.to(tl.int64) * length * batch + row) * heads + head) * (2 * N) + n
        x_at, dt_at = x_ptr + sequence * x_stride + begin * x_token, dt_ptr + sequence * dt_stride + begin * dt_token
        z_at, dy_at = z_ptr + sequence * z_stride + begin * z_token, dy_ptr + sequence * dy_stride + begin * dy_token
        token_strides = (x_token, dt_token, z_token, dy_token, batch * channels, batch * heads * (2 * N))
        first = group * group_blocks
        for block in range(first, tl.minimum(first + group_blocks, head_blocks)):
            d, mask = _channels(head, block, head_channels, CHANNELS)
            tile, inside = _tile(d, mask, d_state, N)
            inputs = (x_at + d, dt_at + d, z_at + d, dy_at + d)
            at = row * channels + d
            outputs = (dx_ptr + at, ddt_ptr + at, dz_ptr + at)
            A = tl.load(A_ptr + tile, mask=inside, other=0.0) * LOG2E
            D = tl.load(D_ptr + d, mask=mask, other=0.0).to(tl.float32)
            bias = tl.load(dt_bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
            slot_at = slot.to(tl.int64) * (channels * d_state) + tile
            start = tl.load(starts_ptr + slot_at, mask=inside, other=0.0)
            end = tl.load(ends_ptr + slot_at, mask=inside, other=0.0)
            dA, dD, dbias = _chunk_back(
                *(start, end, inputs, outputs, BC_at, dBC_at, block == first, token_strides, (A, D, bias), mask),
                *(scratch, tokens, CHUNK, SUB, N, CHANNELS),
            )
            tl.store(dA_ptr + slot_at, dA, mask=inside)
            tl.store(dD_ptr + slot.to(tl.int64) * channels + d, dD, mask=mask)
            tl.store(dbias_ptr + slot.to(tl.int64) * channels + d, dbias, mask=mask)


@triton.jit
def _chunk_back(
    start,
    carry,
    inputs,
    outputs,
    BC_at,
    dBC_at,
    first_block,
    token_strides,
    weights,
    mask,
    scratch,
    tokens,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Stores a chunk's gradients by token; its dA [CHANNELS, N], dD and dbias [CHANNELS].

    States are found twice: for the starts of every SUB tokens, and then, from the last SUB to the first, for each of
    these tokens. So few are kept at once that they stay in the caches.
    """
    size: tl.constexpr = CHANNELS * N
    starts_at = scratch + tl.arange(0, CHANNELS)[:, None] * N + tl.arange(0, N)[None, :]
    states_at = starts_at + (CHUNK // SUB) * size
    subs = tl.cdiv(tokens, SUB)
    h = start
    for sub in range(0, subs):
        tl.store(starts_at + sub * size, h)
        for t in range(sub * SUB, tl.where(sub + 1 < subs, sub * SUB + SUB, 0)):
            h = _next_state(h, t, inputs, BC_at, token_strides, weights, mask)
    dD, dbias = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    dA = tl.zeros((CHANNELS, N), tl.float32)
    for back in range(0, subs):
        first = (subs - 1 - back) * SUB
        count = tl.minimum(tokens - first, SUB)
        tl.debug_barrier()  # all threads have stored the starts, and read the states of before
        h = tl.load(starts_at + (subs - 1 - back) * size)
        for i in range(0, count):
            tl.store(states_at + i * size, h)
            h = _next_state(h, first + i, inputs, BC_at, token_strides, weights, mask)
        tl.debug_barrier()
        for done in range(0, count):
            i = count - 1 - done
            before = tl.load(states_at + i * size)
            carry, grown, dy, dpre = _token_back(
                *(before, carry, first + i, inputs, outputs, BC_at, dBC_at, first_block, token_strides),
                *(weights, mask, N),
            )
            dA, dD, dbias = dA + grown, dD + dy, dbias + dpre
    return dA, dD, dbias


@triton.jit
def _next_state(h, t, inputs, BC_at, token_strides, weights, mask):
    x_at, dt_at, z_at, dy_at = inputs
    x_token, dt_token, z_token, dy_token, out_token, BC_token = token_strides
    step = softplus(_row(dt_at, t * dt_token, mask) + weights[2])
    driven = step * _row(x_at, t * x_token, mask)
    B = tl.load(BC_at + t * BC_token)
    return tl.exp2(step[:, None] * weights[0]) * h + driven[:, None] * B[None, :]


@triton.jit
def _token_back(
    before, carry, t, inputs, outputs, BC_at, dBC_at, first_block, token_strides, weights, mask, N: tl.constexpr
):
    """Stores a token's gradients, from the state before it and the carry; the carry before it, its dA, dD, dbias."""
    x_at, dt_at, z_at, dy_at = inputs
    dx_at, ddt_at, dz_at = outputs
    x_token, dt_token, z_token, dy_token, out_token, BC_token = token_strides
    A, D, bias = weights
    x, z = _row(x_at, t * x_token, mask), _row(z_at, t * z_token, mask)
    pre, dy = _row(dt_at, t * dt_token, mask) + bias, _row(dy_at, t * dy_token, mask)
    B, C = tl.load(BC_at + t * BC_token), tl.load(BC_at + N + t * BC_token)
    step, gate = softplus(pre), sigmoid(z)
    driven, dseen = step * x, dy * z * gate
    decay = tl.exp2(step[:, None] * A)
    kept = decay * before
    h = kept + driven[:, None] * B[None, :]
    dh = carry + dseen[:, None] * C[None, :]
    slope = dh * kept
    seen = tl.sum(h * C[None, :], axis=1) + D * x
    dh_B = tl.sum(dh * B[None, :], axis=1)
    dpre = (LN2 * tl.sum(slope * A, axis=1) + x * dh_B) * sigmoid(pre)
    _store_row(dx_at, t * out_token, D * dseen + step * dh_B, mask)
    _store_row(ddt_at, t * out_token, dpre, mask)
    _store_row(dz_at, t * out_token, dy * seen * gate * (1.0 + z * (1.0 - gate)), mask)
    dB = tl.sum(dh * driven[:, None], axis=0)
    dC = tl.sum(h * dseen[:, None], axis=0)
    at = dBC_at + t * BC_token
    if not first_block:  # blocks of a program come one after the other, and add in place
        dB += tl.load(at)
        dC += tl.load(at + N)
    tl.store(at, dB)
    tl.store(at + N, dC)
    return decay * dh, slope * step[:, None], dseen * x, dpre


@triton.jit
def _channels(head, block, head_channels, CHANNELS: tl.constexpr):
    """The channels of a block of one head's, and which of them are."""
    within = block * CHANNELS + tl.arange(0, CHANNELS)
    return head * head_channels + within, within < head_channels


@triton.jit
def _tile(d, mask, d_state, N: tl.constexpr):
    """Places in [D, N] of a tile [CHANNELS, N], and which are."""
    n = tl.arange(0, N)
    return d[:, None] * d_state + n[None, :], mask[:, None] & (n < d_state)[None, :]


@triton.jit
def _row(at, offset, mask):
    return tl.load(at + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_row(at, offset, value, mask):
    tl.store(at + offset, value.to(at.dtype.element_ty), mask=mask)
