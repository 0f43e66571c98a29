"""Launches the kernels of symmetric_triton.py. Imports Triton: imported where it is there, by symmetric.py alone.

What a call is launched with depends on its shapes alone and is kept in the workspace: an eager call in the middle of a
model costs the host no more than the GPU.
"""

from typing import Any

import torch
import triton

from ..ops.kernel_calls import KernelCall, can_overlap, variant
from .recipes import AllReduceRecipe
from .symmetric_triton import EXACT_TILE, one_shot, two_shot
from .tile_steps import Shape
from .tuning import Launch, launch_for
from .workspace import EXACT_SLOT_BYTES, FLAGS, Workspace

MOST_CALLS = 4096  # kept at a time: prompts of every length pass by


def reduce(
    workspace: Workspace,
    x: torch.Tensor,
    recipe: AllReduceRecipe,
    exact_columns: int,
    how: Launch | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """symmetric.all_reduce over a workspace."""
    if out is None:
        out, x = torch.empty(x.shape, dtype=x.dtype, device=x.device), x[None]
    columns = out.shape[-1] if out.dim() else 1
    x = x.reshape(x.shape[0], -1, columns)
    if x.shape[0] > 1 or (x.stride(2) != 1 and columns > 1):
        x = x.contiguous()
    _launch(workspace, recipe, exact_columns, how, x, (out, out, out, out))
    return out


def reduce_add_norm(
    workspace: Workspace,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    recipe: AllReduceRecipe,
    how: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """symmetric.all_reduce_add_norm over a workspace."""
    x, residual = x.contiguous(), residual.contiguous()
    out, normed = torch.empty_like(residual), torch.empty(residual.shape, dtype=weight.dtype, device=x.device)
    parts = 1 if x.dim() == residual.dim() else x.shape[0]
    _launch(workspace, recipe, 0, how, x.view(parts, -1, x.shape[-1]), (out, residual, weight, normed), eps)
    return out, normed


def _launch(
    workspace: Workspace,
    recipe: AllReduceRecipe,
    exact_columns: int,
    how: Launch | None,
    x: torch.Tensor,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    eps: float | None = None,
) -> None:
    """Reduce x, parts [P, rows, columns] of a sum, into `out`, the first of `tensors` (out, residual, weight, normed);
    given eps, of rows that are tiles, residual + sum into it and the norm of that into normed."""
    key = (recipe, exact_columns, how, x.shape, x.stride(1), eps, variant(x, *tensors))
    calls = workspace.calls.get(key)
    if calls is None:
        if len(workspace.calls) >= MOST_CALLS:
            workspace.calls.clear()
        calls = workspace.calls[key] = _calls(workspace, recipe, exact_columns, how, x, eps)
    for call in calls:
        call(x, *tensors, workspace.counters)


def _calls(
    workspace: Workspace,
    recipe: AllReduceRecipe,
    exact_columns: int,
    how: Launch | None,
    x: torch.Tensor,
    eps: float | None,
) -> list[KernelCall]:
    """The calls of a kernel that reduce x; more than one where it does not fit into the workspace."""
    parts, rows, columns = x.shape
    kept = columns - exact_columns
    values, exact = rows * kept, rows * exact_columns
    how = how or launch_for(workspace.ranks, recipe, values, eps is not None, parts)
    tile_blocks = (kept if eps is not None else max(how.tile, recipe.block_size)) // recipe.block_size
    blocks = -(-values // recipe.block_size)
    at_a_time, exact_at_a_time = workspace.blocks_at_a_time(recipe, how, tile_blocks), workspace.exact_values
    geometry = {
        "values": values,
        "row_length": kept,
        "x_stride": x.stride(1) if rows > 1 else columns,
        "out_stride": columns,
        "exact_columns": exact_columns,
        "eps": eps or 0.0,
    }
    calls = []
    for i in range(max(-(-blocks // at_a_time), -(-exact // exact_at_a_time))):
        part = {
            "first_block": i * at_a_time,
            "all_blocks": max(0, min(at_a_time, blocks - i * at_a_time)),
            "first_exact": i * exact_at_a_time,
            "exact_values": max(0, min(exact_at_a_time, exact - i * exact_at_a_time)),
        }
        calls.append(_call(workspace, recipe, how, tile_blocks, geometry | part, parts, add_norm=eps is not None))
    return calls


def _call(
    workspace: Workspace,
    recipe: AllReduceRecipe,
    how: Launch,
    tile_blocks: int,
    geometry: dict[str, Any],
    parts: int,
    add_norm: bool,
) -> KernelCall:
    if how.way == "two-shot":
        kernel, roles, at = two_shot, 3, {"sums_at": workspace.sums_at}
        tiles = triton.cdiv(geometry["all_blocks"], tile_blocks * workspace.ranks)
    else:
        at = {"codes_at": workspace.words_at if how.way == "words" else 0}
        kernel, roles = one_shot, 2 if how.way == "split" else 1
        tiles = triton.cdiv(geometry["all_blocks"], tile_blocks)
    chunk = how.chunk if roles > 1 else 1
    chunks = triton.cdiv(tiles, chunk)
    programs = roles * min(how.programs or chunks, chunks)
    exact_programs = triton.cdiv(geometry["exact_values"], EXACT_TILE)
    # Only where waiting for the start is what a reduction lasts.
    overlaps = how.way == "words" and can_overlap(workspace.counters.device)
    shape = Shape(
        rank=workspace.rank,
        ranks=workspace.ranks,
        format=recipe.name,
        block_size=recipe.block_size,
        tile_blocks=tile_blocks,
        blocks=triton.next_power_of_2(tile_blocks),
        contiguous=geometry["row_length"] == geometry["x_stride"] == geometry["out_stride"],
        ragged=geometry["values"] % recipe.block_size != 0,
        flagged=how.way != "words",
        split=how.way == "split",
        add_norm=add_norm,
        exact=exact_programs > 0,
        parts=parts,
        threads=32 * how.warps,
        overlaps=overlaps,
    )
    arguments = {
        "buffers": workspace.buffers,
        "flags": workspace.flags,
        "tile_programs": programs,
        "half_bytes": workspace.half_bytes,
        "slot_bytes": workspace.slot_bytes(how.way),
        "exact_at": workspace.exact_at,
        "exact_slot_bytes": EXACT_SLOT_BYTES,
        "half_flags": FLAGS,
        "patience": workspace.patience,
        "chunk": chunk,
        "S": shape,
        "EXACT_TILE": EXACT_TILE,
        **geometry,
        **at,
    }
    options = {"num_warps": how.warps, "enable_fp_fusion": False, "launch_pdl": overlaps}
    if how.registers:
        options["maxnreg"] = how.registers
    return KernelCall(kernel, (programs + exact_programs,), arguments, options)
