"""Where a program of packed sequences stands, and how its lanes hold channels: functions for kernels over [T, D].

A sequence is cut into chunks. A slot is a chunk's number: no two have the same, all are below T // chunk + sequences,
and nobody on the host needs to know a length.

Lane i of a program holds channels 2 i and 2 i + 1, so that a lane's bfloat16 come as one word: a token's row is a tile
[LANES, 2], what is computed with is a pair of tensors, one of each parity.
"""

import triton
import triton.language as tl

_SEARCH = tl.constexpr(128)  # sequences looked at at once


@triton.jit
def sequence_of(cu_seqlens_ptr, sequences, slot, chunk):
    """The sequence whose slot this is, its first slot, its first token (int64), and how many it has.

    Chunk number c of sequence i has slot cu_seqlens[i] // chunk + i + c: some slots have none.
    """
    found = 0
    for start in range(0, sequences, _SEARCH):
        i = start + tl.arange(0, _SEARCH)
        first = tl.load(cu_seqlens_ptr + i, mask=i < sequences, other=0).to(tl.int32) // chunk + i
        found += tl.sum(((first <= slot) & (i < sequences)).to(tl.int32), axis=0)
    sequence = found - 1
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int32)
    length = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int32) - begin
    return sequence, begin // chunk + sequence, begin.to(tl.int64), length


@triton.jit
def chunk_of(cu_seqlens_ptr, sequences, slot, chunk, MULTIPLE: tl.constexpr):
    """The sequence, its first slot, the chunk's first token (int64) and tokens (0: no chunk), whether it is the last,
    and how many slots have chunks: the first ones.

    Chunks of a sequence are of one length near `chunk`, a multiple of MULTIPLE, but for the last, which is no longer.
    """
    sequence, first, before = 0, 0, 0
    for start in range(0, sequences, _SEARCH):
        i = start + tl.arange(0, _SEARCH)
        begins = tl.load(cu_seqlens_ptr + i, mask=i < sequences, other=0).to(tl.int32)
        lengths = tl.load(cu_seqlens_ptr + i + 1, mask=i < sequences, other=0).to(tl.int32) - begins
        counts = tl.where(i < sequences, _chunks(lengths, chunk), 0)
        passed = (before + tl.cumsum(counts, axis=0) <= slot) & (i < sequences)
        sequence += tl.sum(passed.to(tl.int32), axis=0)
        first += tl.sum(tl.where(passed, counts, 0), axis=0)
        before += tl.sum(counts, axis=0)
    begin, tokens, last = tl.zeros((), tl.int64), 0, True
    if slot < before:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int32)
        length = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int32) - start
        size = tl.cdiv(tl.cdiv(length, _chunks(length, chunk)), MULTIPLE) * MULTIPLE
        done = (slot - first) * size
        tokens = tl.minimum(tl.maximum(length - done, 0), size)
        begin, last = (start + done).to(tl.int64), done + tokens >= length
    return sequence, first, begin, tokens, last, before


@triton.jit
def _chunks(length, chunk):
    """How many chunks a sequence has."""
    return tl.maximum((length + chunk // 2) // chunk, 1)


@triton.jit
def channels_of(block, head_channels, head_blocks, LANES: tl.constexpr):
    """Of a block of 2 * LANES channels of one head: the head, each lane's first channel, and which channels are."""
    head = block // head_blocks
    within = block % head_blocks * (2 * LANES) + 2 * tl.arange(0, LANES)
    return head, head * head_channels + within, (within < head_channels, within + 1 < head_channels)


@triton.jit
def pair_of(row_ptr, pair, mask):
    """Values of a vector [D], float32."""
    first = tl.load(row_ptr + pair, mask=mask[0], other=0.0)
    second = tl.load(row_ptr + pair + 1, mask=mask[1], other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def load_state(at, lanes, parity, channel_stride, row_stride, N: tl.constexpr, LANES: tl.constexpr):
    """A state, or A, of the channels of one parity: float32 [N, LANES], zeros where there is none."""
    address, inside = _in_state(at, lanes, parity, channel_stride, row_stride, N, LANES)
    return tl.load(address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_state(at, state, lanes, parity, channel_stride, row_stride, N: tl.constexpr, LANES: tl.constexpr):
    address, inside = _in_state(at, lanes, parity, channel_stride, row_stride, N, LANES)
    tl.store(address, state.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _in_state(at, lanes, parity, channel_stride, row_stride, N: tl.constexpr, LANES: tl.constexpr):
    pair, mask, d_state = lanes
    n = tl.arange(0, N)
    address = at + (pair + parity)[None, :] * channel_stride + n[:, None] * row_stride
    # Said to follow each other from lane to lane, one value each (which is harmless): a load then keeps a column in one
    # thread, instead of spreading it for the sake of wider loads.
    size: tl.constexpr = at.dtype.element_ty.primitive_bitwidth // 8
    address = tl.max_contiguous(tl.multiple_of(address, [size, size]), [1, LANES])
    return address, (n < d_state)[:, None] & mask[parity][None, :]
