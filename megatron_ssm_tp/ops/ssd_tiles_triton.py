"""What the kernels of ssd_triton.py read and write: tokens' rows, their decays, and states.

A state is told by `where`: head, its first channel of a program's block, channels of a head, d_state.
"""

import triton
import triton.language as tl


@triton.jit
def load_decays(step_at, total_at, tokens, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """dt and `total` of a block's tokens [BLOCK], and its last `total`. Tokens that are not there change nothing."""
    t = tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(step_at + t), tl.load(total_at + t), tl.load(total_at + BLOCK - 1)
    else:
        there, end = t < tokens, tl.load(total_at + tokens - 1)
        return tl.load(step_at + t, mask=there, other=0.0), tl.load(total_at + t, mask=there, other=0.0), end


@triton.jit
def load_tile(
    at, stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr
):
    """Tokens' rows [ROWS, COLUMNS], zero where there are none."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if WHOLE and not MASKED:
        return tl.load(at + row * stride + column)
    else:
        return tl.load(at + row * stride + column, mask=(WHOLE | (row < rows)) & (column < columns), other=0.0)


@triton.jit
def store_tile(
    at,
    stride,
    tile,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tile = tile.to(at.dtype.element_ty)
    if WHOLE and not MASKED:
        tl.store(at + row * stride + column, tile)
    else:
        tl.store(at + row * stride + column, tile, mask=(WHOLE | (row < rows)) & (column < columns))


@triton.jit
def load_state(at, where, P: tl.constexpr, N: tl.constexpr):
    """Channels p .. p + P of a head's state, of a slot that begins at `at`: float32 [P, N]."""
    address, mask = _in_state(at, where, P, N)
    return tl.load(address, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(at, state, where, P: tl.constexpr, N: tl.constexpr):
    address, mask = _in_state(at, where, P, N)
    tl.store(address, state.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _in_state(at, where, P: tl.constexpr, N: tl.constexpr):
    head, p, channels, d_state = where
    channel, n = (p + tl.arange(0, P))[:, None], tl.arange(0, N)[None, :]
    return at + (head * channels + channel) * d_state + n, (channel < channels) & (n < d_state)
