"""SlotTable's bookkeeping of a step as one kernel: some twenty of torch's, of two microseconds each."""

import torch
import triton
import triton.language as tl

from ..ops.kernel_calls import launch
from ..ops.overlap_triton import await_inputs

_ROWS = 128  # of a program


def settle(
    tokens: torch.Tensor,
    slots: torch.Tensor,
    end_ids: torch.Tensor,
    limits: torch.Tensor,
    counts: torch.Tensor,
    next_token: torch.Tensor,
    alive: torch.Tensor,
) -> torch.Tensor:
    """SlotTable.settle of tokens and slots int64 [rows], from the table's tensors and into them."""
    emitted = torch.empty_like(tokens)
    tensors = (tokens, slots.contiguous(), emitted, end_ids, limits, counts, next_token, alive)
    numbers = (tokens.numel(), counts.numel() - 1)
    launch(settle_rows, (-(-tokens.numel() // _ROWS),), tensors, numbers, END_IDS=end_ids.shape[1], ROWS=_ROWS)
    return emitted


@triton.jit(do_not_specialize=["rows", "nowhere"])
def settle_rows(
    tokens_ptr,
    slots_ptr,
    emitted_ptr,
    end_ids_ptr,
    limits_ptr,
    counts_ptr,
    next_token_ptr,
    alive_ptr,
    rows,
    nowhere,
    END_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows; those of padding, whose slot is -1, stand for the last, which nobody reads."""
    await_inputs(OVERLAPS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    token = tl.load(tokens_ptr + row, mask=there, other=0)
    slot = tl.load(slots_ptr + row, mask=there, other=-1)
    slot = tl.where(slot < 0, nowhere, slot)
    alive = tl.load(alive_ptr + slot, mask=there, other=0) != 0
    count = tl.load(counts_ptr + slot, mask=there, other=0) + alive.to(tl.int64)
    over = count >= tl.load(limits_ptr + slot, mask=there, other=0)
    for i in tl.static_range(END_IDS):
        over |= tl.load(end_ids_ptr + slot * END_IDS + i, mask=there, other=-1) == token
    tl.store(counts_ptr + slot, count, mask=there)
    tl.store(next_token_ptr + slot, token, mask=there)
    tl.store(alive_ptr + slot, (alive & (over == 0)).to(tl.int1), mask=there)
    tl.store(emitted_ptr + row, tl.where(alive, token, -1), mask=there)
