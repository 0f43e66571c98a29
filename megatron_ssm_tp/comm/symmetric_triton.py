"""The kernels of symmetric.py: a rank's codes are written straight into its peers' memory (transports.py).

The epoch counts a group's calls in device memory, so that a captured kernel counts on as it is replayed. What call e
writes lies in half e % 2 of the buffers, flags too. A rank that writes call e + 2 has finished e + 1, for which every
peer had started e + 1 and so had finished e: nobody still reads what is overwritten. Finished is a call whose kernel
has completed; the epoch may be counted on before. Kernels that begin while the one before them ends, these and all
between two calls, therefore wait for its completion (ops/overlap_triton.py) before they read or write.

A release waits until peers have what was written: that takes longer than to write a tile. In long reductions programs
therefore share the work by roles, some only send and others only receive, and a flag stands for `chunk` tiles. A
program waits only for programs of its own number on the peers, or of the role before; GPUs start programs in the order
of their numbers. So no program waits for one that cannot start, however few run at a time.

The tuples in which arguments travel are those of tile_steps.py. counters_ptr, int32 [2], holds the epoch of the last
call and how many of this one's programs need that no more.
"""

import triton
import triton.language as tl

from ..ops.overlap_triton import await_inputs
from .tile_steps import (
    await_flags,
    encode_own,
    get_tile,
    put_tile,
    put_to_all,
    raise_flags,
    store_sum,
    sum_and_store,
    sum_of_slots,
)
from .tiles import decode_tile, encode_tile
from .transports import finish_call, send_words, sum_over_ranks

EXACT_TILE = 1024  # values a program that sends exact columns


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
    await_inputs(S.overlaps)
    program = tl.program_id(0)
    epoch = tl.load(counters_ptr, volatile=True) + 1
    half = (epoch & 1).to(tl.int64) * half_bytes
    if program < tile_programs:
        source = (x_ptr, first_block, all_blocks, values, row_length, x_stride)
        sink = (out_ptr, residual_ptr, weight_ptr, normed_ptr, first_block, values, row_length, out_stride, eps)
        link = (buffers, flags, half + codes_at, slot_bytes, (epoch & 1) * half_flags, epoch, patience)
        tiles = tl.cdiv(all_blocks, S.tile_blocks)
        if S.split:
            _send_or_sum(program, tile_programs // 2, tiles, chunk, counters_ptr, source, sink, link, S)
        else:
            _send_and_sum(program, tile_programs, tiles, counters_ptr, source, sink, link, S)
    elif S.exact:
        exact = (row_length, x_stride, out_stride, exact_columns, first_exact, exact_values)
        link = (buffers, flags, half + exact_at, exact_slot_bytes, 0, epoch, patience)
        _exact(x_ptr, out_ptr, counters_ptr, program - tile_programs, exact, link, S, EXACT_TILE)


@triton.jit
def _send_and_sum(program, programs, tiles, counters_ptr, source, sink, link, S: tl.constexpr):
    """Tiles of one_shot one after the other: each is sent, waited for and summed."""
    all_blocks = source[2]
    for tile in range(program, tiles, programs):
        codes, scales = encode_own(tile, source, S)
        put_to_all(codes, scales, tile, tile, all_blocks, all_blocks, link, S)
        if S.flagged:
            raise_flags(link, tile * S.ranks, S, False)
        if tile + programs >= tiles:
            finish_call(counters_ptr, link[5])
        sum_and_store(codes, scales, tile, source, sink, link, S)


@triton.jit
def _send_or_sum(program, programs, tiles, chunk, counters_ptr, source, sink, link, S: tl.constexpr):
    """Parts of one_shot's tiles, `chunk` each, by programs in two roles, so many of each."""
    all_blocks = source[2]
    for part in range(program // 2, tl.cdiv(tiles, chunk), programs):
        end = min((part + 1) * chunk, tiles)
        if program % 2 == 0:
            for tile in tl.range(part * chunk, end, num_stages=3):
                codes, scales = encode_own(tile, source, S)
                put_to_all(codes, scales, tile, tile, all_blocks, all_blocks, link, S)
            raise_flags(link, part * S.ranks, S, False)
        else:
            await_flags(link, part * S.ranks, S, False)
            for tile in tl.range(part * chunk, end, num_stages=2):
                # Its own is encoded once more: x is in the L2 cache still, codes would go there and back.
                codes, scales = encode_own(tile, source, S)
                sum_and_store(codes, scales, tile, source, sink, link, S)
    finish_call(counters_ptr, link[5])


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
                _send_parts(part * chunk, end, flag, source, parts, slot_blocks, S)
            elif program % 3 == 1:
                _sum_parts(part * chunk, end, flag, source, sink, parts, sums, slot_blocks, S)
            else:
                _take_sums(part * chunk, end, flag, source, sink, sums, slot_blocks, S)
        finish_call(counters_ptr, epoch)
    elif S.exact:
        exact = (row_length, x_stride, out_stride, exact_columns, first_exact, exact_values)
        link = (buffers, flags, half + exact_at, exact_slot_bytes, 0, epoch, patience)
        _exact(x_ptr, out_ptr, counters_ptr, program - tile_programs, exact, link, S, EXACT_TILE)


@triton.jit
def _send_parts(first, end, flag, source, parts, slot_blocks, S: tl.constexpr):
    """Of rows first to end: every tile to the rank that sums it."""
    RANKS: tl.constexpr = S.ranks
    for row in range(first, end):
        for peer in tl.static_range(RANKS):
            tile = row * S.ranks + peer
            codes, scales = encode_own(tile, source, S)
            put_tile(codes, scales, tile, row, slot_blocks, source[2], parts, S, peer)
    raise_flags(parts, flag, S, True)


@triton.jit
def _sum_parts(first, end, flag, source, sink, parts, sums, slot_blocks, S: tl.constexpr):
    """This rank's tiles of rows first to end: their sums, encoded, to all; decoded again, to their place."""
    FORMAT: tl.constexpr = S.format
    SUM: tl.constexpr = source[0].dtype.element_ty if S.parts == 1 else sink[3].dtype.element_ty
    all_blocks = source[2]
    await_flags(parts, flag, S, True)
    for row in range(first, end):
        tile = row * S.ranks + S.rank
        total = sum_of_slots(tile, row, slot_blocks, all_blocks, parts, S)
        codes, scales = encode_tile(total, FORMAT)
        put_to_all(codes, scales, tile, row, slot_blocks, all_blocks, sums, S)
        store_sum(decode_tile(codes, scales, FORMAT), tile, sink, all_blocks, SUM, S)
    raise_flags(sums, flag, S, False)


@triton.jit
def _take_sums(first, end, flag, source, sink, sums, slot_blocks, S: tl.constexpr):
    """The peers' tiles of rows first to end: their sums to their places."""
    RANKS: tl.constexpr = S.ranks
    SUM: tl.constexpr = source[0].dtype.element_ty if S.parts == 1 else sink[3].dtype.element_ty
    all_blocks = source[2]
    await_flags(sums, flag, S, False)
    for row in range(first, end):
        for peer in tl.static_range(RANKS):
            if peer != S.rank:
                tile = row * S.ranks + peer
                total = get_tile(tile, row, slot_blocks, all_blocks, sums, S, peer)
                store_sum(total, tile, sink, all_blocks, SUM, S)


@triton.jit
def _exact(x_ptr, out_ptr, counters_ptr, tile, exact, link, S: tl.constexpr, TILE: tl.constexpr):
    """Sum the columns behind row_length as float32 words."""
    row_length, x_stride, out_stride, columns, first, values = exact
    place = tile * TILE + tl.arange(0, TILE)
    mask = place < values
    row, column = ((first + place) // columns).to(tl.int64), row_length + (first + place) % columns
    own = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    send_words(own.to(tl.int32, bitcast=True), place, mask, link, S.rank, S.ranks)
    finish_call(counters_ptr, link[5])
    total = sum_over_ranks(own, place, mask, link, S.rank, S.ranks, TILE, S.threads)
    tl.store(out_ptr + row * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=mask)
