"""The causal depthwise convolution and its SiLU on GPUs: reference.causal_conv1d_varlen and _step as Triton kernels.

x is read once and y written: 4 bytes a token and channel in bfloat16, 0.09 ms for 8192 tokens x 8192 channels at
3 TB/s. Arithmetic, some 16 instructions and two of the special-function units a value, is less than half of that.
"""

import torch

from ..errors import UserError
from .conv1d_triton import conv1d_chunks, conv1d_step
from .kernel_calls import launch
from .launching import dense_states, last_axis_dense, row_unit

Tile = tuple[int, int, int, int]  # of a program: tokens, channels, warps, and tokens loaded at a time
WIDE, NARROW = (16, 512, 4, 8), (32, 256, 4, 8)  # for 8192 channels and more, and for fewer: measured on an H100
STEP_CHANNELS = {16: 128, 1 << 30: 256}  # of a program, by requests at most; measured on an H100


def causal_conv1d_varlen(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Over packed sequences, from and into the states of their slots.

    Args:
        x: [T, D], bfloat16, float16 or float32; rows of any stride. weight: [D, K]. bias: [D].
        states: [slots, D, K], the last K inputs; read at each sequence's start and written in place at its end.
        slots: int [s], each sequence's own.
        cu_seqlens: int [s + 1], where sequences begin and end in T. Not read by the host.
        tile: how the kernel is launched, of at least K - 1 tokens; None: by D.

    Returns:
        y [T, D] in x's dtype. Nothing here is differentiable.

    Raises:
        UserError: the tile has fewer tokens than K - 1.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sequences = cu_seqlens.numel() - 1
    if not out.numel() or sequences < 1:
        return out
    x, weight, cached = last_axis_dense(x), weight.contiguous(), dense_states(states)
    bias, slots = None if bias is None else bias.contiguous(), slots.contiguous()
    tokens, channels, warps, group = tile or _tile_for(x.shape[1])
    if tokens < weight.shape[1] - 1:
        raise UserError("tile", tile, f"has too few tokens before those of {weight.shape[1]} taps", "more tokens")
    grid, unit = (-(-x.shape[1] // channels), x.shape[0] // tokens + sequences), row_unit(x.stride(0))
    launch(
        conv1d_chunks,
        grid,
        (x, weight, bias, out, cached, slots, cu_seqlens.contiguous()),
        (sequences, x.shape[1], x.stride(0) // unit, cached.stride(0)),
        UNIT=unit,
        WIDTH=weight.shape[1],
        TOKENS=tokens,
        CHANNELS=channels,
        GROUP=group,
        MASKED=x.shape[1] % channels != 0,
        num_warps=warps,
    )
    if cached is not states:
        states.copy_(cached)
    return out


def _tile_for(channels: int) -> Tile:
    return WIDE if channels >= 8192 else NARROW


def causal_conv1d_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    at_rest: bool = False,
) -> torch.Tensor:
    """One token for each of s requests: x [s, D], states [slots, D, K] updated in place; returns y [s, D].

    Args:
        at_rest: the kernel launched before this does not write states or slots: their reading need not wait for it.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, weight, cached = last_axis_dense(x), weight.contiguous(), dense_states(states)
    bias, dense_slots = None if bias is None else bias.contiguous(), slots.contiguous()
    block = next(channels for most, channels in STEP_CHANNELS.items() if x.shape[0] <= most)
    launch(
        conv1d_step,
        (-(-x.shape[1] // block), x.shape[0]),
        (x, weight, bias, out, cached, dense_slots),
        (x.shape[1], x.stride(0), cached.stride(0)),
        WIDTH=weight.shape[1],
        CHANNELS=block,
        AT_REST=at_rest and cached is states and dense_slots is slots,
        num_warps=4,
    )
    if cached is not states:
        states.copy_(cached)
    return out
