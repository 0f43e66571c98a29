"""Launches the kernels of symmetric_triton.py. Imports Triton: imported where it is there, by symmetric.py alone."""

from typing import Any

import torch
import triton

from .recipes import AllReduceRecipe
from .symmetric_triton import EXACT_TILE, Shape, one_shot, two_shot
from .tuning import Launch, launch_for
from .workspace import EXACT_SLOT_BYTES, FLAGS, Workspace

Norm = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


def reduce(
    workspace: Workspace, x: torch.Tensor, recipe: AllReduceRecipe, exact_columns: int, how: Launch | None = None
) -> torch.Tensor:
    """symmetric.all_reduce over a workspace."""
    columns = x.shape[-1] if x.dim() else 1
    rows, kept = x.numel() // columns, columns - exact_columns
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = _as_rows(x.reshape(rows, columns))
    geometry = {
        "values": rows * kept,
        "row_length": kept,
        "x_stride": x.stride(0) if rows > 1 else columns,
        "out_stride": columns,
        "exact_columns": exact_columns,
        "exact_values": rows * exact_columns,
    }
    how = how or launch_for(workspace.ranks, recipe, rows * kept)
    _launch(workspace, recipe, how, max(1, how.tile // recipe.block_size), geometry, x, out)
    return out


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns], copied if its rows are not contiguous in themselves."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


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
    out, normed = torch.empty_like(residual), torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    columns = x.shape[-1]
    geometry = {
        "values": x.numel(),
        "row_length": columns,
        "x_stride": columns,
        "out_stride": columns,
        "exact_columns": 0,
        "exact_values": 0,
    }
    how = how or launch_for(workspace.ranks, recipe, x.numel(), fused=True)
    norm = (residual, weight, normed, eps)
    _launch(workspace, recipe, how, columns // recipe.block_size, geometry, x, out, norm)
    return out, normed


def _launch(
    workspace: Workspace,
    recipe: AllReduceRecipe,
    how: Launch,
    tile_blocks: int,
    geometry: dict[str, Any],
    x: torch.Tensor,
    out: torch.Tensor,
    norm: Norm | None = None,
) -> None:
    """Reduce x into `out`; given norm (residual, weight, normed, eps), residual + sum into `out` and that into normed.

    What does not fit into the workspace takes several calls of the kernel.
    """
    blocks, exact = -(-geometry["values"] // recipe.block_size), geometry["exact_values"]
    at_a_time, exact_at_a_time = workspace.blocks_at_a_time(recipe, how, tile_blocks), workspace.exact_values
    for call in range(max(-(-blocks // at_a_time), -(-exact // exact_at_a_time))):
        part = {
            "first_block": call * at_a_time,
            "all_blocks": max(0, min(at_a_time, blocks - call * at_a_time)),
            "first_exact": call * exact_at_a_time,
            "exact_values": max(0, min(exact_at_a_time, exact - call * exact_at_a_time)),
        }
        _launch_once(workspace, recipe, how, tile_blocks, geometry | part, x, out, norm)


def _launch_once(
    workspace: Workspace,
    recipe: AllReduceRecipe,
    how: Launch,
    tile_blocks: int,
    geometry: dict[str, Any],
    x: torch.Tensor,
    out: torch.Tensor,
    norm: Norm | None,
) -> None:
    residual, weight, normed, eps = norm or (out, out, out, 0.0)
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
        add_norm=norm is not None,
        exact=exact_programs > 0,
    )
    kernel[(programs + exact_programs,)](
        x,
        out,
        residual,
        weight,
        normed,
        workspace.buffers,
        workspace.flags,
        workspace.counters,
        tile_programs=programs,
        half_bytes=workspace.half_bytes,
        slot_bytes=workspace.slot_bytes(how.way),
        exact_at=workspace.exact_at,
        exact_slot_bytes=EXACT_SLOT_BYTES,
        half_flags=FLAGS,
        patience=workspace.patience,
        chunk=chunk,
        eps=eps,
        S=shape,
        EXACT_TILE=EXACT_TILE,
        num_warps=how.warps,
        enable_fp_fusion=False,
        **at,
        **geometry,
    )
