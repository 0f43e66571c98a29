"""The kernels of symmetric.py: a rank's codes are written straight into its peers' memory (transports.py).

The epoch counts a group's calls in device memory, so that a captured kernel counts on as it is replayed. What call e
writes lies in half e % 2 of the buffers, flags too. A rank that writes call e + 2 has finished e + 1, for which every
peer had started e + 1 and so had finished e: nobody still reads what is overwritten.

A release waits until peers have what was written: that takes longer than to write a tile. In long reductions programs
therefore share the work by roles, some only send and others only receive, and a flag stands for `chunk` tiles. A
program waits only for programs of its own number on the peers, or of the role before; GPUs start programs in the order
of their numbers. So no program waits for one that cannot start, however few run at a time.

What travels between functions in tuples:

    source   x_ptr, first_block, all_blocks, values, row_length, x_stride
    sink     out_ptr, residual_ptr, weight_ptr, normed_ptr, first_block, values, row_length, out_stride, eps
    link     buffers, flags, offset, slot_bytes, flags_at, epoch, patience

x and `out` are rows of row_length values, x_stride and out_stride apart; `values` is the whole tensor's number. A call
reduces all_blocks blocks from first_block on. buffers and flags are the addresses of each rank's buffer and of its
flags (int32). counters_ptr, int32 [2], holds the epoch of the last call and how many of this one's programs have ended;
patience is how often a rank looks before it gives a peer up.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .quantize_triton import addresses
from .tiles import decode_tile, encode_tile
from .transports import as_words, get, put, raise_flag, read_words, wait_for_flag

EXACT_TILE = 1024  # values a program that sends exact columns


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

    @property
    def flag_a_tile(self) -> bool:
        return self.flagged and not self.split


@triton.jit
def one_shot(
    x_ptr,
    out_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    counters_ptr,
    buffers,
    flags,
    first_block,
    all_blocks,
    tile_programs,
    values,
    row_length,
    x_stride,
    out_stride,
    exact_columns,
    first_exact,
    exact_values,
    half_bytes,
    slot_bytes,
    codes_at,
    exact_at,
    exact_slot_bytes,
    half_flags,
    patience,
    chunk,
    eps,
    S: tl.constexpr,
    EXACT_TILE: tl.constexpr,
):
    """Every rank sends all its codes to all and sums what it gets; split, in two roles.

    The programs from tile_programs on sum the exact_columns behind each row's row_length values.
    """
    program = tl.program_id(0)
    epoch = tl.load(counters_ptr, volatile=True) + 1
    half = (epoch & 1).to(tl.int64) * half_bytes
    if program < tile_programs:
        source = (x_ptr, first_block, all_blocks, values, row_length, x_stride)
        sink = (out_ptr, residual_ptr, weight_ptr, normed_ptr, first_block, values, row_length, out_stride, eps)
        link = (buffers, flags, half + codes_at, slot_bytes, (epoch & 1) * half_flags, epoch, patience)
        tiles = tl.cdiv(all_blocks, S.tile_blocks)
        if S.split:
            programs = tile_programs // 2
            for part in range(program // 2, tl.cdiv(tiles, chunk), programs):
                end = min((part + 1) * chunk, tiles)
                if program % 2 == 0:
                    for tile in tl.range(part * chunk, end, num_stages=3):
                        codes, scales = _encode(tile, source, S)
                        _put_to_all(codes, scales, tile, tile, all_blocks, all_blocks, link, S, False)
                    _raise_flags(link, part * S.ranks, S, False)
                else:
                    _await_flags(link, part * S.ranks, S, False)
                    for tile in tl.range(part * chunk, end, num_stages=2):
                        # Its own is encoded once more: x is in the L2 cache still, codes would go there and back.
                        codes, scales = _encode(tile, source, S)
                        _sum_and_store(codes, scales, tile, source, sink, link, S)
        else:
            for tile in range(program, tiles, tile_programs):
                codes, scales = _encode(tile, source, S)
                _put_to_all(codes, scales, tile, tile, all_blocks, all_blocks, link, S, False)
                if S.flagged:
                    _raise_flags(link, tile * S.ranks, S, False)
                _sum_and_store(codes, scales, tile, source, sink, link, S)
    elif S.exact:
        exact = (row_length, x_stride, out_stride, exact_columns, first_exact, exact_values)
        link = (buffers, flags, half + exact_at, exact_slot_bytes, 0, epoch, patience)
        _exact(x_ptr, out_ptr, program - tile_programs, exact, link, S, EXACT_TILE)
    _finish(counters_ptr, epoch)


@triton.jit
def two_shot(
    x_ptr,
    out_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    counters_ptr,
    buffers,
    flags,
    first_block,
    all_blocks,
    tile_programs,
    values,
    row_length,
    x_stride,
    out_stride,
    exact_columns,
    first_exact,
    exact_values,
    half_bytes,
    slot_bytes,
    sums_at,
    exact_at,
    exact_slot_bytes,
    half_flags,
    patience,
    chunk,
    eps,
    S: tl.constexpr,
    EXACT_TILE: tl.constexpr,
):
    """Row by row of `ranks` tiles: each rank sums one of them, encodes the sum and sends that to all; in three roles.

    `chunk` rows have 2 * ranks flags: that a rank's parts are here, that its sums are here.
    """
    FORMAT: tl.constexpr = S.format
    RANKS: tl.constexpr = S.ranks
    SUM: tl.constexpr = x_ptr.dtype.element_ty
    program = tl.program_id(0)
    epoch = tl.load(counters_ptr, volatile=True) + 1
    half = (epoch & 1).to(tl.int64) * half_bytes
    if program < tile_programs:
        source = (x_ptr, first_block, all_blocks, values, row_length, x_stride)
        sink = (out_ptr, residual_ptr, weight_ptr, normed_ptr, first_block, values, row_length, out_stride, eps)
        flags_at = (epoch & 1) * half_flags
        parts = (buffers, flags, half, slot_bytes, flags_at, epoch, patience)
        sums = (buffers, flags, half + sums_at, slot_bytes, flags_at + S.ranks, epoch, patience)
        rows = tl.cdiv(tl.cdiv(all_blocks, S.tile_blocks), S.ranks)
        slot_blocks = rows * S.tile_blocks
        programs = tile_programs // 3
        for part in range(program // 3, tl.cdiv(rows, chunk), programs):
            flag = part * 2 * S.ranks
            end = min((part + 1) * chunk, rows)
            if program % 3 == 0:
                for row in range(part * chunk, end):
                    for peer in tl.static_range(RANKS):
                        tile = row * S.ranks + peer
                        codes, scales = _encode(tile, source, S)
                        _put(codes, scales, tile, row, slot_blocks, all_blocks, parts, S, peer)
                _raise_flags(parts, flag, S, True)
            elif program % 3 == 1:
                _await_flags(parts, flag, S, True)
                for row in range(part * chunk, end):
                    tile = row * S.ranks + S.rank
                    total = _sum_of_slots(tile, row, slot_blocks, all_blocks, parts, S)
                    codes, scales = encode_tile(total, FORMAT)
                    _put_to_all(codes, scales, tile, row, slot_blocks, all_blocks, sums, S, False)
                    _finish_tile(decode_tile(codes, scales, FORMAT), tile, sink, all_blocks, SUM, S)
                _raise_flags(sums, flag, S, False)
            else:
                _await_flags(sums, flag, S, False)
                for row in range(part * chunk, end):
                    for peer in tl.static_range(RANKS):
                        if peer != S.rank:
                            tile = row * S.ranks + peer
                            total = _get(tile, row, slot_blocks, all_blocks, sums, S, peer)
                            _finish_tile(total, tile, sink, all_blocks, SUM, S)
    elif S.exact:
        exact = (row_length, x_stride, out_stride, exact_columns, first_exact, exact_values)
        link = (buffers, flags, half + exact_at, exact_slot_bytes, 0, epoch, patience)
        _exact(x_ptr, out_ptr, program - tile_programs, exact, link, S, EXACT_TILE)
    _finish(counters_ptr, epoch)


@triton.jit
def _blocks_of(tile, all_blocks, S: tl.constexpr):
    """Numbers of a tile's blocks [BLOCKS], and which of them there are."""
    within = tl.arange(0, S.blocks)
    blocks = tile * S.tile_blocks + within
    return blocks, (within < S.tile_blocks) & (blocks < all_blocks)


@triton.jit
def _encode(tile, source, S: tl.constexpr):
    """Codes and scales of a tile of x."""
    FORMAT: tl.constexpr = S.format
    x_ptr, first_block, all_blocks, values, row_length, row_stride = source
    blocks, mask = _blocks_of(tile, all_blocks, S)
    places, address = addresses(first_block + blocks, row_length, row_stride, S.contiguous, S.block_size)
    mask = mask[:, None]
    if S.ragged:
        mask = mask & (places < values)
    return encode_tile(tl.load(x_ptr + address, mask=mask, other=0.0).to(tl.float32), FORMAT)


@triton.jit
def _put(codes, scales, tile, at, slot_blocks, all_blocks, link, S: tl.constexpr, PEER: tl.constexpr):
    """Write a tile into this rank's slot in the peer's buffer, as the slot's tile `at`."""
    FORMAT: tl.constexpr = S.format
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    mask = _blocks_of(tile, all_blocks, S)[1]
    within = at * S.tile_blocks + tl.arange(0, S.blocks)
    slot = buffers[PEER] + offset + slot_bytes * S.rank
    put(codes, scales, within, mask, slot, slot_blocks, epoch, FORMAT, S.flagged)


@triton.jit
def _put_to_all(codes, scales, tile, at, slot_blocks, all_blocks, link, S: tl.constexpr, OWN: tl.constexpr):
    """_put to every peer, and to this rank itself where what is its OWN is read from there too."""
    RANKS: tl.constexpr = S.ranks
    for peer in tl.static_range(RANKS):
        if OWN or peer != S.rank:
            _put(codes, scales, tile, at, slot_blocks, all_blocks, link, S, peer)


@triton.jit
def _get(tile, at, slot_blocks, all_blocks, link, S: tl.constexpr, SOURCE: tl.constexpr):
    """The values, float32, that SOURCE wrote as tile `at` of its slot here."""
    FORMAT: tl.constexpr = S.format
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    mask = _blocks_of(tile, all_blocks, S)[1]
    within = at * S.tile_blocks + tl.arange(0, S.blocks)
    slot = buffers[S.rank] + offset + slot_bytes * SOURCE
    return get(within, mask, slot, slot_blocks, epoch, patience, FORMAT, S.block_size, S.flagged)


@triton.jit
def _raise_flags(link, at, S: tl.constexpr, OWN: tl.constexpr):
    """Tell all peers that what the program's threads wrote is there."""
    RANKS: tl.constexpr = S.ranks
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    tl.debug_barrier()
    for peer in tl.static_range(RANKS):
        if OWN or peer != S.rank:
            raise_flag(flags[peer], flags_at + at + S.rank, epoch)


@triton.jit
def _await_flags(link, at, S: tl.constexpr, OWN: tl.constexpr):
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
        _await_flags(link, tile * S.ranks, S, False)
    for rank in tl.static_range(RANKS):
        if rank == S.rank:
            part = decode_tile(codes, scales, FORMAT)
        else:
            part = _get(tile, tile, all_blocks, all_blocks, link, S, rank)
        if rank == 0:
            total = part
        else:
            total += part
    return total


@triton.jit
def _sum_of_slots(tile, at, slot_blocks, all_blocks, link, S: tl.constexpr):
    """As _sum, of what all ranks wrote here."""
    RANKS: tl.constexpr = S.ranks
    total = _get(tile, at, slot_blocks, all_blocks, link, S, 0)
    for rank in tl.static_range(1, RANKS):
        total += _get(tile, at, slot_blocks, all_blocks, link, S, rank)
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
def _sum_and_store(codes, scales, tile, source, sink, link, S: tl.constexpr):
    """Of a tile of this rank's, given in codes: the sum over the ranks, or what add_norm makes of it, to its place."""
    SUM: tl.constexpr = source[0].dtype.element_ty
    all_blocks = source[2]
    if S.add_norm:
        residual, weight = _residual_and_weight(tile, sink, all_blocks, S)
        total = _sum(codes, scales, tile, all_blocks, link, S)
        _store_normed(total, residual, weight, tile, sink, all_blocks, SUM, S)
    else:
        total = _sum(codes, scales, tile, all_blocks, link, S)
        _store(total, tile, sink, all_blocks, SUM, S)


@triton.jit
def _finish_tile(total, tile, sink, all_blocks, SUM: tl.constexpr, S: tl.constexpr):
    if S.add_norm:
        residual, weight = _residual_and_weight(tile, sink, all_blocks, S)
        _store_normed(total, residual, weight, tile, sink, all_blocks, SUM, S)
    else:
        _store(total, tile, sink, all_blocks, SUM, S)


@triton.jit
def _exact(x_ptr, out_ptr, tile, exact, link, S: tl.constexpr, TILE: tl.constexpr):
    """Sum the columns behind row_length as float32 words."""
    RANKS: tl.constexpr = S.ranks
    row_length, x_stride, out_stride, columns, first, values = exact
    buffers, flags, offset, slot_bytes, flags_at, epoch, patience = link
    place = tile * TILE + tl.arange(0, TILE)
    mask = place < values
    row, column = ((first + place) // columns).to(tl.int64), row_length + (first + place) % columns
    own = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    for peer in tl.static_range(RANKS):
        if peer != S.rank:
            slot = (buffers[peer] + offset + slot_bytes * S.rank).to(tl.pointer_type(tl.int64))
            tl.store(slot + place, as_words(own.to(tl.int32, bitcast=True), epoch), mask=mask)
    for rank in tl.static_range(RANKS):
        if rank == S.rank:
            part = own
        else:
            slot = (buffers[S.rank] + offset + slot_bytes * rank).to(tl.pointer_type(tl.int64))
            part = read_words(slot + place, mask, epoch, patience).to(tl.float32, bitcast=True)
        if rank == 0:
            total = part
        else:
            total += part
    tl.store(out_ptr + row * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(counters_ptr, epoch):
    """Count the call when the last of its programs ends."""
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(counters_ptr + 1, 0)
        tl.store(counters_ptr, epoch)
