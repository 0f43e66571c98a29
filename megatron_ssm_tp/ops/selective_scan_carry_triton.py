"""Before selective_scan_back_triton.py, whose formulas these are: what each chunk adds to the carry before it.

And how kernels of the backward find their tiles [CHANNELS, N].
"""

import triton
import triton.language as tl

from .elementwise_triton import LOG2E, sigmoid, softplus


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
    d, mask = channels_of_block(head, tl.program_id(1) % head_blocks, head_channels, CHANNELS)
    tile, inside = state_tile(d, mask, d_state, N)
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
        step = softplus(load_row(dt_at, t * dt_token, mask) + bias)
        z = load_row(z_at, t * z_token, mask)
        seen = load_row(dy_at, t * dy_token, mask) * z * sigmoid(z)
        C = tl.load(C_at + t * (batch * heads * (2 * N)))
        carry = tl.exp2(step[:, None] * A) * (carry + seen[:, None] * C[None, :])
        steps += step
    tl.store(carries_ptr + slot.to(tl.int64) * (channels * d_state) + tile, carry, mask=inside)
    tl.store(steps_ptr + slot.to(tl.int64) * channels + d, steps, mask=mask)


@triton.jit
def channels_of_block(head, block, head_channels, CHANNELS: tl.constexpr):
    """The channels of a block of one head's, and which of them are."""
    within = block * CHANNELS + tl.arange(0, CHANNELS)
    return head * head_channels + within, within < head_channels


@triton.jit
def state_tile(d, mask, d_state, N: tl.constexpr):
    """Places in [D, N] of a tile [CHANNELS, N], and which are."""
    n = tl.arange(0, N)
    return d[:, None] * d_state + n[None, :], mask[:, None] & (n < d_state)[None, :]


@triton.jit
def load_row(at, offset, mask):
    return tl.load(at + offset, mask=mask, other=0.0).to(tl.float32)
