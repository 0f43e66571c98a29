"""embedding.py's kernel: a program has a part of a token's row."""

import torch
import triton
import triton.language as tl

from .kernel_calls import launch
from .overlap_triton import await_inputs

_BLOCK = 1024  # columns of a program


def rows_of(token_ids: torch.Tensor, weight: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
    """embedding.embedding_rows."""
    rows, columns = weight.shape
    out = torch.empty(token_ids.numel(), columns, dtype=dtype, device=weight.device)
    if out.numel():
        grid = (token_ids.numel(), -(-columns // _BLOCK))
        tensors = (token_ids.contiguous(), weight.contiguous(), out)
        launch(copy_rows, grid, tensors, (first, rows), COLUMNS=columns, BLOCK=_BLOCK)
    return out


@triton.jit(do_not_specialize=["first", "rows"])
def copy_rows(
    token_ids_ptr, weight_ptr, out_ptr, first, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    """The row of a token's, or zeros."""
    await_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_ids_ptr + token) - first
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = (row >= 0) & (row < rows)
    values = tl.load(weight_ptr + row * COLUMNS + column, mask=here & (column < COLUMNS), other=0.0)
    tl.store(out_ptr + token * COLUMNS + column, values.to(out_ptr.dtype.element_ty), mask=column < COLUMNS)
