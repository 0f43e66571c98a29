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
from .selective_scan_carry_triton import channels_of_block, load_row, state_tile

LN2 = tl.constexpr(0.6931471805599453)


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
    weights, ends = (A_ptr, D_ptr, dt_bias_ptr), (starts_ptr, ends_ptr)
    sums = (dA_ptr, dD_ptr, dbias_ptr)
    token_strides = (x_token, dt_token, z_token, dy_token, batch * channels, batch * heads * (2 * N))
    for item in range(tl.program_id(0), chunks * batch * heads * groups, tl.num_programs(0)):
        group, head, slot = item % groups, item // groups % heads, item // groups // heads
        sequence, begin = (slot // chunks).to(tl.int64), (slot % chunks).to(tl.int64) * CHUNK
        tokens = tl.minimum(length - begin, CHUNK).to(tl.int32)
        row = begin * batch + sequence  # of dense [l, b, ..]
        BC_at = BC_ptr + (row * heads + head) * (2 * N) + n
        dBC_at = dBC_ptr + ((group.to(tl.int64) * length * batch + row) * heads + head) * (2 * N) + n
        x_at, dt_at = x_ptr + sequence * x_stride + begin * x_token, dt_ptr + sequence * dt_stride + begin * dt_token
        z_at, dy_at = z_ptr + sequence * z_stride + begin * z_token, dy_ptr + sequence * dy_stride + begin * dy_token
        inputs = (x_at, dt_at, z_at, dy_at)
        outputs = (dx_ptr + row * channels, ddt_ptr + row * channels, dz_ptr + row * channels)
        first = group * group_blocks
        for block in range(first, tl.minimum(first + group_blocks, head_blocks)):
            d, mask = channels_of_block(head, block, head_channels, CHANNELS)
            _block_back(
                *(slot.to(tl.int64) * channels, d, mask, d_state, ends, weights, inputs, outputs, sums),
                *(BC_at, dBC_at, block == first, token_strides, scratch, tokens, CHUNK, SUB, N, CHANNELS),
            )


@triton.jit
def _block_back(
    at,
    d,
    mask,
    d_state,
    ends,
    weights,
    inputs,
    outputs,
    sums,
    BC_at,
    dBC_at,
    first,
    token_strides,
    scratch,
    tokens,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A chunk's gradients of the channels d. `at`: where the chunk's slot begins in [slots, D]."""
    tile, inside = state_tile(d, mask, d_state, N)
    A = tl.load(weights[0] + tile, mask=inside, other=0.0) * LOG2E
    D = tl.load(weights[1] + d, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(weights[2] + d, mask=mask, other=0.0).to(tl.float32)
    start = tl.load(ends[0] + at * d_state + tile, mask=inside, other=0.0)
    end = tl.load(ends[1] + at * d_state + tile, mask=inside, other=0.0)
    given = (inputs[0] + d, inputs[1] + d, inputs[2] + d, inputs[3] + d)
    found = (outputs[0] + d, outputs[1] + d, outputs[2] + d)
    dA, dD, dbias = _chunk_back(
        *(start, end, given, found, BC_at, dBC_at, first, token_strides, (A, D, bias), mask),
        *(scratch, tokens, CHUNK, SUB, N, CHANNELS),
    )
    tl.store(sums[0] + at * d_state + tile, dA, mask=inside)
    tl.store(sums[1] + at + d, dD, mask=mask)
    tl.store(sums[2] + at + d, dbias, mask=mask)


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
    step = softplus(load_row(dt_at, t * dt_token, mask) + weights[2])
    driven = step * load_row(x_at, t * x_token, mask)
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
    x, z = load_row(x_at, t * x_token, mask), load_row(z_at, t * z_token, mask)
    pre, dy = load_row(dt_at, t * dt_token, mask) + bias, load_row(dy_at, t * dy_token, mask)
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
def _store_row(at, offset, value, mask):
    tl.store(at + offset, value.to(at.dtype.element_ty), mask=mask)
