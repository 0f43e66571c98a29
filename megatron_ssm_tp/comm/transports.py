"""How a tile of codes gets into a peer's memory, and how one knows that it did: functions for symmetric_triton.py.

Two transports carry a tile [BLOCKS, BLOCK_SIZE] of codes:

words   every 8 bytes are 4 bytes of codes and the call's epoch: who reads waits until the epochs are there. No fence,
        no flag, one trip: for small tensors. Twice the bytes. That 8 aligned bytes arrive at once is what NCCL's
        low-latency protocol relies on too; plain stores are seen by volatile loads without a fence.
flags   codes as they are, a barrier, and a flag a tile set with release semantics, which the reader acquires.
"""

import triton
import triton.language as tl

from .tiles import decode_tile


@triton.jit
def _give_up():
    """End the process's kernels: a peer has not answered. The host sees an error at its next call."""
    tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_flag(flags, at, epoch, patience):
    """Wait until the flag at `at` of this rank is of this epoch: what was written before it can then be read."""
    flag = flags.to(tl.pointer_type(tl.int32)) + at
    tries = 0
    while (tl.atomic_add(flag, 0, sem="acquire", scope="sys") != epoch) & (tries < patience):
        tries += 1
    if tries >= patience:
        _give_up()


@triton.jit
def _late(words, epoch):
    """Whether any of these 8-byte words is not of this epoch."""
    late = ((words >> 32) != epoch.to(tl.int64)).to(tl.int32)
    if len(late.shape) == 2:
        late = tl.max(late, axis=1)
    return tl.max(late, axis=0) != 0


@triton.jit
def read_words(ptr, mask, epoch, patience, WORDS: tl.constexpr, THREADS: tl.constexpr):
    """The low halves of WORDS 8-byte words, int32, once all of them have arrived; by THREADS threads."""
    absent = epoch.to(tl.int64) << 32
    words = tl.load(ptr, mask=mask, other=absent, volatile=True)
    tries = 0
    while _late(words, epoch) & (tries < patience):
        words = tl.load(ptr, mask=mask, other=absent, volatile=True)
        tries += 1
    if tries >= patience:
        _give_up()
    if WORDS > 32 and WORDS < THREADS:
        # Warps then hold copies, each read by itself, and not all of them have voted: read what the voters saw.
        words = tl.load(ptr, mask=mask, other=absent, volatile=True)
    return words.to(tl.int32)


@triton.jit
def as_words(bits, epoch):
    """int32 -> 8-byte words of this epoch."""
    return (bits.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)


@triton.jit
def send_words(bits, place, mask, link, RANK: tl.constexpr, RANKS: tl.constexpr):
    """int32 bits to the words at `place` of this rank's slot in every peer's buffer. link: see tile_steps.py."""
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            slot = (buffers[peer] + offset + slot_bytes * RANK).to(tl.pointer_type(tl.int64))
            tl.store(slot + place, as_words(bits, epoch), mask=mask)


@triton.jit
def words_of(rank: tl.constexpr, place, mask, link, RANK: tl.constexpr, WORDS: tl.constexpr, THREADS: tl.constexpr):
    """The int32 bits that `rank` has sent to `place`, WORDS of them, once all have arrived."""
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    slot = (buffers[RANK] + offset + slot_bytes * rank).to(tl.pointer_type(tl.int64))
    return read_words(slot + place, mask, epoch, patience, WORDS, THREADS)


@triton.jit
def sum_over_ranks(
    own, place, mask, link, RANK: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr, THREADS: tl.constexpr
):
    """`own`, float32, that send_words has sent to `place`, and the peers': summed in rank order."""
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            part = own
        else:
            part = words_of(rank, place, mask, link, RANK, WORDS, THREADS).to(tl.float32, bitcast=True)
        if rank == 0:
            total = part
        else:
            total += part
    return total


@triton.jit
def finish_call(counters_ptr, epoch):
    """Count the call when the last of its programs gets here: none needs the old number any more.

    Where it waits for peers next, counting takes no time.
    """
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(counters_ptr + 1, 0)
        # Memory that was never written says 0: no call has that number. -1 is odd, and 2 is even, as halves alternate.
        tl.store(counters_ptr, tl.where(epoch == -1, 1, epoch))


@triton.jit
def _pack(codes, CODES: tl.constexpr):
    """uint8 or int16 [BLOCKS, codes] -> int32 [BLOCKS, codes / CODES], the first in the low bits."""
    bits: tl.constexpr = 32 // CODES
    parts = codes.to(tl.int32) & ((1 << bits) - 1)
    parts = parts.reshape(codes.shape[0], codes.shape[1] // CODES, CODES)
    return tl.sum(parts << (tl.arange(0, CODES) * bits)[None, None, :], axis=2)


@triton.jit
def _unpack(words, CODES: tl.constexpr):
    bits: tl.constexpr = 32 // CODES
    parts = words[:, :, None] >> (tl.arange(0, CODES) * bits)[None, None, :]
    parts = parts.reshape(words.shape[0], words.shape[1] * CODES)
    if CODES == 4:
        return parts.to(tl.uint8)
    else:
        return parts.to(tl.int16)


@triton.jit
def _tile_at(slot, blocks, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Pointers [BLOCKS, WIDTH] to blocks' elements. A block begins at a multiple of 8 bytes, most of 16: Triton, which
    cannot see it through an address made of integers, is told, or would store and load each element by itself."""
    at = blocks[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    aligned: tl.constexpr = 16 if WIDTH * (TYPE.primitive_bitwidth // 8) % 16 == 0 else 8
    return tl.max_contiguous(tl.multiple_of(slot.to(tl.pointer_type(TYPE)) + at, (aligned, aligned)), (1, WIDTH))


@triton.jit
def put(codes, scales, blocks, mask, slot, slot_blocks, epoch, FORMAT: tl.constexpr, FLAGGED: tl.constexpr):
    """Write a tile into a slot: all codes of slot_blocks blocks, then all scales; blocks are counted in the slot."""
    width: tl.constexpr = codes.shape[1]
    if FLAGGED:
        tl.store(_tile_at(slot, blocks, width, codes.dtype), codes, mask=mask[:, None])
        if FORMAT != "bf16":
            scales_at = (slot + tl.cast(slot_blocks, tl.int64) * width).to(tl.pointer_type(tl.float32))
            tl.store(scales_at + blocks, scales, mask=mask)
    else:
        per_word: tl.constexpr = 2 if FORMAT == "bf16" else 4
        words: tl.constexpr = width // per_word
        tl.store(_tile_at(slot, blocks, words, tl.int64), as_words(_pack(codes, per_word), epoch), mask=mask[:, None])
        if FORMAT != "bf16":
            scales_at = slot.to(tl.pointer_type(tl.int64)) + slot_blocks * words
            tl.store(scales_at + blocks, as_words(scales.to(tl.int32, bitcast=True), epoch), mask=mask)


@triton.jit
def get(
    blocks,
    mask,
    slot,
    slot_blocks,
    epoch,
    patience,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FLAGGED: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The values float32 [BLOCKS, BLOCK_SIZE] of a tile that a peer wrote into a slot."""
    scales = tl.zeros((blocks.shape[0],), tl.float32)
    width: tl.constexpr = BLOCK_SIZE // 2 if FORMAT == "int4" else BLOCK_SIZE
    if FLAGGED:
        code: tl.constexpr = tl.int16 if FORMAT == "bf16" else tl.uint8
        codes = tl.load(_tile_at(slot, blocks, width, code), mask=mask[:, None], other=0)
        if FORMAT != "bf16":
            scales_at = (slot + tl.cast(slot_blocks, tl.int64) * width).to(tl.pointer_type(tl.float32))
            scales = tl.load(scales_at + blocks, mask=mask, other=0.0)
    else:
        per_word: tl.constexpr = 2 if FORMAT == "bf16" else 4
        words: tl.constexpr = width // per_word
        all_words: tl.constexpr = blocks.shape[0] * words
        ptr = _tile_at(slot, blocks, words, tl.int64)
        codes = _unpack(read_words(ptr, mask[:, None], epoch, patience, all_words, THREADS), per_word)
        if FORMAT != "bf16":
            scales_at = slot.to(tl.pointer_type(tl.int64)) + slot_blocks * words
            all_scales: tl.constexpr = blocks.shape[0]
            bits = read_words(scales_at + blocks, mask, epoch, patience, all_scales, THREADS)
            scales = bits.to(tl.float32, bitcast=True)
    return decode_tile(codes, scales, FORMAT)


@triton.jit
def raise_flag(flags, at, epoch):
    """Tell the rank whose flags these are that what this program wrote to it before is there."""
    tl.atomic_xchg(flags.to(tl.pointer_type(tl.int32)) + at, epoch, sem="release", scope="sys")
