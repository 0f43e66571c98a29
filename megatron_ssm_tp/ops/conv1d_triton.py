"""The kernels of conv1d.py: a program walks along the tokens of a chunk, the last WIDTH - 1 inputs in registers.

A lane holds neighbouring channels, which come as one word of up to 16 bytes. Each input is loaded once, but for the
WIDTH - 1 before a chunk.
"""

import triton
import triton.language as tl

from .elementwise_triton import silu
from .lanes_triton import sequence_of
from .overlap_triton import await_inputs


@triton.jit(do_not_specialize=["sequences"])
def conv1d_chunks(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    states_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    sequences,
    channels,
    x_stride,
    state_stride,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """TOKENS tokens of a sequence. The program of its first ones reads its state and writes the new one: no other.

    GROUP tokens are loaded while those before them are computed. MASKED: CHANNELS does not divide the channels.
    x_stride counts UNIT values.
    """
    x_stride *= UNIT
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    slot = tl.program_id(1)
    sequence, first, begin, length = sequence_of(cu_seqlens_ptr, sequences, slot, TOKENS)
    done = (slot - first) * TOKENS
    if done < length:
        left = tl.minimum(length - done, TOKENS)
        x_ptr += begin * x_stride
        row_ptr = x_ptr + done.to(tl.int64) * x_stride
        out_ptr += (begin + done) * channels
        state_at = states_ptr + tl.load(slots_ptr + sequence).to(tl.int64) * state_stride + d * WIDTH
        rows = _load_rows(row_ptr, x_stride, left, d, mask, GROUP, MASKED)
        before = _inputs_before(row_ptr, x_stride, state_at, d, mask, slot == first, WIDTH)
        taps, bias = _weights(weight_ptr, bias_ptr, d, mask, CHANNELS, WIDTH)
        while left > 0:
            row_ptr += GROUP * x_stride
            coming = _load_rows(row_ptr, x_stride, left - GROUP, d, mask, GROUP, MASKED)
            for i in tl.static_range(GROUP):
                window = before + (rows[i].to(tl.float32),)
                total = bias
                for tap in tl.static_range(WIDTH):
                    total += window[tap] * taps[tap]
                there = (i < left) & mask if MASKED else i < left
                tl.store(out_ptr + i * channels + d, silu(total).to(out_ptr.dtype.element_ty), mask=there)
                before = window[1:]
            rows = coming
            out_ptr += GROUP * channels
            left -= GROUP
        if slot == first:
            tl.debug_barrier()  # all threads have read the state
            _store_last(x_ptr, x_stride, d, mask, state_at, length, WIDTH)


@triton.jit
def _load_rows(row_ptr, x_stride, left, d, mask, GROUP: tl.constexpr, MASKED: tl.constexpr):
    """The inputs [CHANNELS] of GROUP tokens as they come; zero where fewer are left."""
    rows = ()
    for i in tl.static_range(GROUP):
        there = (i < left) & mask if MASKED else i < left
        rows = rows + (tl.load(row_ptr + i * x_stride + d, mask=there, other=0.0),)
    return rows


@triton.jit
def _inputs_before(row_ptr, x_stride, state_at, d, mask, is_first, WIDTH: tl.constexpr):
    """The WIDTH - 1 inputs before a chunk, float32: of the sequence, or of its state before its first chunk."""
    rows = ()
    for back in tl.static_range(WIDTH - 1, 0, -1):
        x = tl.load(row_ptr - back * x_stride + d, mask=mask & (is_first == 0), other=0.0).to(tl.float32)
        rows = rows + (x + tl.load(state_at + (WIDTH - back), mask=mask & is_first, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _weights(weight_ptr, bias_ptr, d, mask, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH taps and the bias, float32 [CHANNELS] each."""
    taps = ()
    for tap in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight_ptr + d * WIDTH + tap, mask=mask, other=0.0).to(tl.float32),)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros((CHANNELS,), tl.float32)
    return taps, bias


@triton.jit
def _store_last(x_ptr, x_stride, d, mask, state_at, length, WIDTH: tl.constexpr):
    """The last WIDTH inputs of a sequence to its state, which may hold some of them: from the first on, so that none is
    overwritten before it has moved."""
    for column in tl.static_range(WIDTH):
        source = length - WIDTH + column
        if source >= 0:
            value = tl.load(x_ptr + source.to(tl.int64) * x_stride + d, mask=mask, other=0.0)
            tl.store(state_at + column, value.to(state_at.dtype.element_ty), mask=mask)
        else:
            tl.store(state_at + column, tl.load(state_at + (WIDTH + source), mask=mask, other=0.0), mask=mask)


@triton.jit
def conv1d_step(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    states_ptr,
    slots_ptr,
    channels,
    x_stride,
    state_stride,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    AT_REST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One token of one request. AT_REST: states and slots are read before what the kernel before writes is waited
    for."""
    if not AT_REST:
        await_inputs(OVERLAPS)
    d, request = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1).to(tl.int64)
    mask = d < channels
    slot = tl.load(slots_ptr + request).to(tl.int64)
    own = mask & (slot >= 0)  # Megatron pads batches with slots of -1
    state_at = states_ptr + slot * state_stride + d * WIDTH
    before = _columns(state_at, own, WIDTH)
    if AT_REST:
        await_inputs(OVERLAPS)
    x = tl.load(x_ptr + request * x_stride + d, mask=mask, other=0.0)
    total = tl.zeros((CHANNELS,), tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    taps = _columns(weight_ptr + d * WIDTH, mask, WIDTH)
    for tap in tl.static_range(WIDTH):
        value = before[tap + 1] if tap + 1 < WIDTH else x
        total += value.to(tl.float32) * taps[tap].to(tl.float32)
    _store_columns(state_at, before[1:] + (x.to(state_at.dtype.element_ty),), own, WIDTH)
    tl.store(out_ptr + request * channels + d, silu(total).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _columns(at, mask, WIDTH: tl.constexpr):
    """WIDTH neighbouring values behind each of `at`, a tensor for each place; four come as one word."""
    if WIDTH == 4:
        whole = tl.load(at[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(whole, (whole.shape[0], 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth
    else:
        values = ()
        for i in tl.static_range(WIDTH):
            values = values + (tl.load(at + i, mask=mask, other=0.0),)
        return values


@triton.jit
def _store_columns(at, values, mask, WIDTH: tl.constexpr):
    """The inverse of `_columns`."""
    if WIDTH == 4:
        pairs = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
        whole = tl.reshape(pairs, (pairs.shape[0], 4))
        tl.store(at[:, None] + tl.arange(0, 4)[None, :], whole, mask=mask[:, None])
    else:
        for i in tl.static_range(WIDTH):
            tl.store(at + i, values[i], mask=mask)
