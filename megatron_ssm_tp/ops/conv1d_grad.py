"""The causal depthwise convolution and its SiLU in training on GPUs: reference.causal_conv1d as Triton kernels.

Nothing but the arguments is kept for backward: what stood before SiLU is found anew. All sums are made in one order:
results do not differ from run to run.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from . import reference
from .conv1d_grad_triton import conv1d_back, conv1d_dense
from .launching import last_axis_dense


@dataclass(frozen=True)
class ConvLaunch:
    """How the kernels are launched.

    Args:
        tokens, channels, warps: of a program's tile.
        back_tokens, back_channels, tiles: of backward, of whose programs each takes `tiles` tiles of a sequence.
    """

    tokens: int = 32
    channels: int = 128
    back_tokens: int = 16
    back_channels: int = 64
    tiles: int = 8
    warps: int = 4


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial: torch.Tensor | None = None,
    how: ConvLaunch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution, then SiLU.

    Args:
        x: [b, l, D], bfloat16, float16 or float32; any strides. weight: [D, K]. bias: [D].
        initial: [b, D, K], the inputs before x; None is zeros.

    Returns:
        y [b, l, D] in x's dtype, and the last K inputs, float32 [b, D, K]. Both are differentiable, once, by every
        argument.
    """
    if not x.numel():
        return reference.causal_conv1d(x, weight, bias, initial)
    width, how = weight.shape[1], how or ConvLaunch()
    if initial is None:
        y = _CausalConv1d.apply(x, weight, bias, how)
        last = x[:, -width:]
        if x.shape[1] < width:
            last = torch.cat([last.new_zeros(len(x), width - x.shape[1], x.shape[2]), last], dim=1)
    else:  # few tokens, as a rule: inference, where training's path is taken with states
        inputs = torch.cat([initial.transpose(1, 2), x], dim=1)
        y = _CausalConv1d.apply(inputs, weight, bias, how)[:, width:].to(x.dtype)
        last = inputs[:, -width:]
    return y, last.float().transpose(1, 2)


class _CausalConv1d(torch.autograd.Function):
    """From zeros; x [b, l, D] -> y of the same shape, dense as [l, b, D]: the order of a model's activations."""

    @staticmethod
    def forward(ctx, x, weight, bias, how):
        bias = None if bias is None else bias.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.how = how
        batch, length, channels = x.shape
        out, x = x.new_empty(length, batch, channels), last_axis_dense(x)
        tiles = -(-length // how.tokens)
        conv1d_dense[batch * tiles, -(-channels // how.channels)](
            *(x, weight.contiguous(), bias, out, length, tiles, batch, channels, *x.stride()[:2]),
            WIDTH=weight.shape[1],
            TOKENS=how.tokens,
            CHANNELS=how.channels,
            num_warps=how.warps,
        )
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight, bias), how = ctx.saved_tensors, ctx.how
        batch, length, channels = x.shape
        width, dx = weight.shape[1], x.new_empty(length, batch, channels)
        x, dy = last_axis_dense(x), last_axis_dense(dy)
        runs = -(-length // (how.tiles * how.back_tokens))
        sums = x.new_empty(batch * runs, width + 1, channels, dtype=torch.float32)
        conv1d_back[batch * runs, -(-channels // how.back_channels)](
            *(x, weight.contiguous(), bias, dy, dx, sums, length, runs, batch, channels),
            *(*x.stride()[:2], *dy.stride()[:2]),
            WIDTH=width,
            TOKENS=how.back_tokens,
            CHANNELS=how.back_channels,
            TILES=how.tiles,
            num_warps=how.warps,
        )
        sums = sums.sum(0)
        dbias = None if bias is None else sums[width].to(bias.dtype)
        return dx.transpose(0, 1), sums[:width].T.to(weight.dtype), dbias, None
