"""The kernels of conv1d_grad.py: tiles of tokens and channels, and their neighbours in time read again."""

import triton
import triton.language as tl

from .elementwise_triton import sigmoid, silu


@triton.jit
def conv1d_dense(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    length,
    tiles,
    batch,
    channels,
    x_stride,
    x_token,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y [l, b, D], dense, of x from zeros. _stride is a sequence's, _token a token's."""
    sequence, token, d, mask = _tile(tl.program_id(0), tiles, channels, TOKENS, CHANNELS)
    taps, bias = _weights(weight_ptr, bias_ptr, d, mask, WIDTH)
    x_at = x_ptr + sequence * x_stride + d[None, :]
    total = tl.zeros((TOKENS, CHANNELS), tl.float32) + bias[None, :]
    for tap in tl.static_range(WIDTH):
        total += _rows(x_at, token + (tap - WIDTH + 1), x_token, length, mask) * taps[tap][None, :]
    at = out_ptr + (token * batch + sequence)[:, None] * channels + d[None, :]
    tl.store(at, silu(total).to(out_ptr.dtype.element_ty), mask=(token < length)[:, None] & mask[None, :])


@triton.jit
def conv1d_back(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    dx_ptr,
    sums_ptr,
    length,
    runs,
    batch,
    channels,
    x_stride,
    x_token,
    dy_stride,
    dy_token,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """dx [l, b, D], dense, of a run of TILES tiles, and its sums of the taps' and the bias's gradients.

    `sums`: [b * runs, WIDTH + 1, D]. The sum before SiLU, and so its gradient, is found anew for the WIDTH tokens that
    a token reaches.
    """
    sequence, token, d, mask = _tile(tl.program_id(0), runs, channels, TOKENS, CHANNELS, TILES)
    taps, bias = _weights(weight_ptr, bias_ptr, d, mask, WIDTH)
    x_at = x_ptr + sequence * x_stride + d[None, :]
    dy_at = dy_ptr + sequence * dy_stride + d[None, :]
    sums = ()
    for _ in tl.static_range(WIDTH + 1):
        sums = sums + (tl.zeros((TOKENS, CHANNELS), tl.float32),)
    for _ in range(TILES):
        xs = ()
        for shift in tl.static_range(2 * WIDTH - 1):
            xs = xs + (_rows(x_at, token + (shift - WIDTH + 1), x_token, length, mask),)
        dx = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for ahead in tl.static_range(WIDTH):
            pre = tl.zeros((TOKENS, CHANNELS), tl.float32) + bias[None, :]
            for tap in tl.static_range(WIDTH):
                pre += xs[ahead + tap] * taps[tap][None, :]
            gate = sigmoid(pre)
            dpre = _rows(dy_at, token + ahead, dy_token, length, mask) * gate * (1.0 + pre * (1.0 - gate))
            dx += dpre * taps[WIDTH - 1 - ahead][None, :]
            if ahead == 0:
                grown = ()
                for tap in tl.static_range(WIDTH):
                    grown = grown + (sums[tap] + dpre * xs[tap],)
                sums = grown + (sums[WIDTH] + dpre,)
        at = dx_ptr + (token * batch + sequence)[:, None] * channels + d[None, :]
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=(token < length)[:, None] & mask[None, :])
        token += TOKENS
    at = sums_ptr + tl.program_id(0).to(tl.int64) * ((WIDTH + 1) * channels) + d
    for row in tl.static_range(WIDTH + 1):
        tl.store(at + row * channels, tl.sum(sums[row], axis=0), mask=mask)


@triton.jit
def _tile(number, tiles, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr = 1):
    """The sequence and the first TOKENS tokens of its run of tiles (int64), the channels, and which of them are."""
    token = (number % tiles).to(tl.int64) * (RUN * TOKENS) + tl.arange(0, TOKENS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return (number // tiles).to(tl.int64), token, d, d < channels


@triton.jit
def _weights(weight_ptr, bias_ptr, d, mask, WIDTH: tl.constexpr):
    """The taps, a tuple of float32 [CHANNELS], and the bias."""
    taps, bias = (), tl.zeros(d.shape, tl.float32)
    for tap in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight_ptr + d * WIDTH + tap, mask=mask, other=0.0).to(tl.float32),)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def _rows(at, token, stride, length, mask):
    """Rows of these tokens, float32; zeros before the first and behind the last."""
    own = ((token >= 0) & (token < length))[:, None] & mask[None, :]
    return tl.load(at + token[:, None] * stride, mask=own, other=0.0).to(tl.float32)
