"""What a program of symmetric_triton.py's kernels does with a tile: encode, send, wait, sum, store.

What travels between functions in tuples:

    source   x_ptr, first_block, all_blocks, values, row_length, x_stride
    sink     out_ptr, residual_ptr, weight_ptr, normed_ptr, first_block, values, row_length, out_stride, eps
    link     buffers, flags, offset, slot_bytes, flags_at, epoch, patience

x and `out` are rows of row_length values, x_stride and out_stride apart; `values` is the whole tensor's number. x may
be S.parts such tensors behind each other, float32 and without gaps, to be added first. A call reduces all_blocks blocks
from first_block on. buffers and flags are the addresses of each rank's buffer and of its flags (int32); patience is how
often a rank looks before it gives a peer up.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from ..ops.norm_triton import sum_of_parts
from .tiles import addresses, decode_tile, encode_tile
from .transports import get, put, raise_flag, wait_for_flag


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for.

    Args:
        rank, ranks: this rank and their number.
        format, block_size: the recipe's.
        tile_blocks, blocks: blocks in a tile, and the power of two that holds them.
        contiguous: x and `out` have no gaps.
        ragged: the values do not fill their last block.
        flagged: one_shot's transport; two_shot's always is.
        split: one_shot is done in two roles.
        add_norm: a tile is a row, to which a residual is added and which is normed.
        exact: some columns are summed as they are.
        parts: tensors that x is the sum of.
        threads: of a program.
        overlaps: it begins while the kernel before it ends, and lets the next one begin (ops/overlap_triton.py).
    """

    rank: int
    ranks: int
    format: str
    block_size: int
    tile_blocks: int
    blocks: int
    contiguous: bool
    ragged: bool
    flagged: bool
    split: bool
    add_norm: bool
    exact: bool
    parts: int
    threads: int
    overlaps: bool

    @property
    def flag_a_tile(self) -> bool:
        return self.flagged and not self.split


@triton.jit
def _blocks_of(tile, all_blocks, S: tl.constexpr):
    """Numbers of a tile's blocks [BLOCKS], and which of them there are."""
    within = tl.arange(0, S.blocks)
    blocks = tile * S.tile_blocks + within
    return blocks, (within < S.tile_blocks) & (blocks < all_blocks)


@triton.jit
def encode_own(tile, source, S: tl.constexpr):
    """Codes and scales of a tile of x; a sum of parts is not rounded before it is encoded."""
    FORMAT: tl.constexpr = S.format
    x_ptr, first_block, all_blocks, values, row_length, row_stride = source
    blocks, mask = _blocks_of(tile, all_blocks, S)
    places, address = addresses(first_block + blocks, row_length, row_stride, S.contiguous, S.block_size)
    mask = mask[:, None]
    if S.ragged:
        mask = mask & (places < values)
    return encode_tile(sum_of_parts(x_ptr + address, mask, values, S.parts, tl.float32).to(tl.float32), FORMAT)


@triton.jit
def put_tile(codes, scales, tile, at, slot_blocks, all_blocks, link, S: tl.constexpr, PEER: tl.constexpr):
    """Write a tile into this rank's slot in the peer's buffer, as the slot's tile `at`."""
    FORMAT: tl.constexpr = S.format
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    mask = _blocks_of(tile, all_blocks, S)[1]
    within = at * S.tile_blocks + tl.arange(0, S.blocks)
    slot = buffers[PEER] + offset + slot_bytes * S.rank
    put(codes, scales, within, mask, slot, slot_blocks, epoch, FORMAT, S.flagged)


@triton.jit
def put_to_all(codes, scales, tile, at, slot_blocks, all_blocks, link, S: tl.constexpr):
    """put_tile to every peer."""
    RANKS: tl.constexpr = S.ranks
    for peer in tl.static_range(RANKS):
        if peer != S.rank:
            put_tile(codes, scales, tile, at, slot_blocks, all_blocks, link, S, peer)


@triton.jit
def get_tile(tile, at, slot_blocks, all_blocks, link, S: tl.constexpr, SOURCE: tl.constexpr):
    """The values, float32, that SOURCE wrote as tile `at` of its slot here."""
    FORMAT: tl.constexpr = S.format
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    mask = _blocks_of(tile, all_blocks, S)[1]
    within = at * S.tile_blocks + tl.arange(0, S.blocks)
    slot = buffers[S.rank] + offset + slot_bytes * SOURCE
    return get(within, mask, slot, slot_blocks, epoch, patience, FORMAT, S.block_size, S.flagged, S.threads)


@triton.jit
def raise_flags(link, at, S: tl.constexpr, OWN: tl.constexpr):
    """Tell all peers that what the program's threads wrote is there."""
    RANKS: tl.constexpr = S.ranks
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    tl.debug_barrier()
    for peer in tl.static_range(RANKS):
        if OWN or peer != S.rank:
            raise_flag(flags[peer], flags_at + at + S.rank, epoch)


@triton.jit
def await_flags(link, at, S: tl.constexpr, OWN: tl.constexpr):
    """Wait until all peers have said so."""
    RANKS: tl.constexpr = S.ranks
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    for peer in tl.static_range(RANKS):
        if OWN or peer != S.rank:
            wait_for_flag(flags[S.rank], flags_at + at + peer, epoch, patience)
    tl.debug_barrier()


@triton.jit
def _sum(codes, scales, tile, all_blocks, link, S: tl.constexpr):
    """float32 [BLOCKS, BLOCK_SIZE]: this rank's tile, given in codes, and its peers', once there, in rank order."""
    FORMAT: tl.constexpr = S.format
    RANKS: tl.constexpr = S.ranks
    if S.flag_a_tile:
        await_flags(link, tile * S.ranks, S, False)
    for rank in tl.static_range(RANKS):
        if rank == S.rank:
            part = decode_tile(codes, scales, FORMAT)
        else:
            part = get_tile(tile, tile, all_blocks, all_blocks, link, S, rank)
        if rank == 0:
            total = part
        else:
            total += part
    return total


@triton.jit
def sum_of_slots(tile, at, slot_blocks, all_blocks, link, S: tl.constexpr):
    """As _sum, of what all ranks wrote here."""
    RANKS: tl.constexpr = S.ranks
    total = get_tile(tile, at, slot_blocks, all_blocks, link, S, 0)
    for rank in tl.static_range(1, RANKS):
        total += get_tile(tile, at, slot_blocks, all_blocks, link, S, rank)
    return total


@triton.jit
def _places(tile, sink, all_blocks, S: tl.constexpr):
    """Where a tile's values lie in `out`, and which of them there are."""
    out_ptr, residual_ptr, weight_ptr, normed_ptr, first_block, values, row_length, row_stride, eps = sink
    blocks, mask = _blocks_of(tile, all_blocks, S)
    places, address = addresses(first_block + blocks, row_length, row_stride, S.contiguous, S.block_size)
    mask = mask[:, None]
    if S.ragged:
        mask = mask & (places < values)
    return address, mask


@triton.jit
def _store(total, tile, sink, all_blocks, SUM: tl.constexpr, S: tl.constexpr):
    """A tile of the sum, float32, to its place in `out`."""
    address, mask = _places(tile, sink, all_blocks, S)
    tl.store(sink[0] + address, total.to(SUM), mask=mask)


@triton.jit
def _residual_and_weight(tile, sink, all_blocks, S: tl.constexpr):
    """Of a tile that is a row. Loaded before the row's sum is waited for."""
    address, mask = _places(tile, sink, all_blocks, S)
    columns = tl.arange(0, S.blocks)[:, None] * S.block_size + tl.arange(0, S.block_size)[None, :]
    return tl.load(sink[1] + address, mask=mask, other=0.0), tl.load(sink[2] + columns, mask=mask, other=0.0)


@triton.jit
def _store_normed(total, residual, weight, tile, sink, all_blocks, SUM: tl.constexpr, S: tl.constexpr):
    """A row of the sum, float32: residual + sum to its place in `out`, and the norm of that.

    Rounds where a reduction to dtype SUM, an addition and layers.norm.LocalRMSNorm after each other do.
    """
    out_ptr, residual_ptr, weight_ptr, normed_ptr, first_block, values, row_length, row_stride, eps = sink
    address, mask = _places(tile, sink, all_blocks, S)
    stream = (total.to(SUM).to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
    tl.store(out_ptr + address, stream, mask=mask)
    wide = tl.where(mask, stream.to(weight.dtype).to(tl.float32), 0.0)
    mean = tl.sum(tl.sum(wide * wide, axis=1), axis=0) / row_length
    wide = (wide * tl.rsqrt(mean + eps)).to(weight.dtype).to(tl.float32)
    tl.store(normed_ptr + address, (wide * weight.to(tl.float32)).to(weight.dtype), mask=mask)


@triton.jit
def sum_and_store(codes, scales, tile, source, sink, link, S: tl.constexpr):
    """Of a tile of this rank's, given in codes: the sum over the ranks, or what add_norm makes of it, to its place."""
    SUM: tl.constexpr = source[0].dtype.element_ty if S.parts == 1 else sink[3].dtype.element_ty
    all_blocks = source[2]
    if S.add_norm:
        # Loaded before the peers' codes are waited for, where store_sum would load them after.
        residual, weight = _residual_and_weight(tile, sink, all_blocks, S)
        total = _sum(codes, scales, tile, all_blocks, link, S)
        _store_normed(total, residual, weight, tile, sink, all_blocks, SUM, S)
    else:
        total = _sum(codes, scales, tile, all_blocks, link, S)
        _store(total, tile, sink, all_blocks, SUM, S)


@triton.jit
def store_sum(total, tile, sink, all_blocks, SUM: tl.constexpr, S: tl.constexpr):
    """A tile's sum, float32, or what add_norm makes of it, to its place."""
    if S.add_norm:
        residual, weight = _residual_and_weight(tile, sink, all_blocks, S)
        _store_normed(total, residual, weight, tile, sink, all_blocks, SUM, S)
    else:
        _store(total, tile, sink, all_blocks, SUM, S)
