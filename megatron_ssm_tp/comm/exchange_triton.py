"""exchange.py's kernels: what a program has made it sends to its namesakes on the peers, and waits for what they send.

They are calls of a group's as symmetric_triton.py's are, counted with them, and their words lie where small one-shot
reductions have theirs.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..ops.argmax_triton import BLOCK, WARPS, largest_of
from ..ops.few_rows_launch import pick_launch
from ..ops.few_rows_triton import in_lanes, row_products
from ..ops.kernel_calls import launch
from ..ops.launching import last_axis_dense
from ..ops.overlap_triton import await_inputs
from .transports import finish_call, send_words, sum_over_ranks, words_of
from .workspace import WORDS_SLOT_BYTES, Workspace

SLOT_BYTES = tl.constexpr(WORDS_SLOT_BYTES)


def reduced_product(workspace: Workspace, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [s, K] weight [R, K]^T in x's dtype, summed over the ranks."""
    how = pick_launch(*weight.shape, x.shape[0])
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    grid, tensors, numbers, constants = in_lanes(x, weight, how)
    tensors, numbers = (*tensors, out, workspace.counters), (*_numbers(workspace), *numbers)
    launch(sum_products, grid, tensors, numbers, **constants, **_ranks(workspace, how.warps))
    return out


def largest_over_ranks(workspace: Workspace, x: torch.Tensor, first: int, columns: int) -> torch.Tensor:
    """exchange.argmax_over_ranks over a workspace."""
    x = last_axis_dense(x)
    out = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    numbers = (*_numbers(workspace), x.stride(0), columns, first)
    tensors = (x, out, workspace.counters)
    launch(
        argmax_row_over_ranks, (x.shape[0],), tensors, numbers, BLOCK=BLOCK, num_warps=WARPS, **_ranks(workspace, WARPS)
    )
    return out


def _numbers(workspace: Workspace) -> tuple[Any, ...]:
    return workspace.buffers, workspace.half_bytes, workspace.words_at, workspace.patience


def _ranks(workspace: Workspace, warps: int) -> dict[str, int]:
    return {"RANK": workspace.rank, "RANKS": workspace.ranks, "THREADS": 32 * warps}


@triton.jit
def sum_products(
    x_ptr,
    weight_ptr,
    out_ptr,
    counters_ptr,
    buffers,
    half_bytes,
    words_at,
    patience,
    rows,
    x_stride,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    REQUESTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    THREADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """few_rows_triton.lane_sums, summed over the ranks; each rank's are rounded before."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    products = row_products(
        x_ptr, x_stride * UNIT, weight_ptr, row, rows, COLUMNS, REQUESTS, ROWS, BLOCK_K, STAGES, OVERLAPS
    )
    epoch = tl.load(counters_ptr, volatile=True) + 1
    link = (buffers, 0, (epoch & 1).to(tl.int64) * half_bytes + words_at, SLOT_BYTES, 0, epoch, patience)
    own = ()
    for request in tl.static_range(REQUESTS):
        own = own + (products[request].to(out_ptr.dtype.element_ty).to(tl.float32),)
        bits = own[request].to(tl.int32, bitcast=True)
        send_words(bits, request * rows + row, row < rows, link, RANK, RANKS)
    finish_call(counters_ptr, epoch)
    for request in tl.static_range(REQUESTS):
        place = request * rows + row
        total = sum_over_ranks(own[request], place, row < rows, link, RANK, RANKS, ROWS, THREADS)
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def argmax_row_over_ranks(
    x_ptr,
    out_ptr,
    counters_ptr,
    buffers,
    half_bytes,
    words_at,
    patience,
    x_stride,
    columns,
    first,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    THREADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """argmax_triton.argmax_row of a row whose columns lie one after the other on the ranks: a word for the largest
    value, and one for its place."""
    await_inputs(OVERLAPS)
    row = tl.program_id(0)
    largest, place = largest_of(x_ptr + row.to(tl.int64) * x_stride, columns, BLOCK)
    place += first
    epoch = tl.load(counters_ptr, volatile=True) + 1
    link = (buffers, 0, (epoch & 1).to(tl.int64) * half_bytes + words_at, SLOT_BYTES, 0, epoch, patience)
    which = tl.arange(0, 2)
    words = 2 * row + which
    bits = tl.where(which == 0, largest.to(tl.int32, bitcast=True), place)
    send_words(bits, words, which < 2, link, RANK, RANKS)
    finish_call(counters_ptr, epoch)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            sent = words_of(rank, words, which < 2, link, RANK, 2, THREADS)
            value = tl.sum(tl.where(which == 0, sent, 0), axis=0).to(tl.float32, bitcast=True)
            other = tl.sum(tl.where(which == 1, sent, 0), axis=0)
            better = (value > largest) | ((value == largest) & (other < place))
            largest, place = tl.where(better, value, largest), tl.where(better, other, place)
    tl.store(out_ptr + row, place)
