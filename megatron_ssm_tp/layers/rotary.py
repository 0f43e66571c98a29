"""Rotary position embedding (Su et al. 2021; HF LlamaRotaryEmbedding, BambaRotaryEmbedding)."""

import torch

from ..config import RotaryConfig


def rotate(x: torch.Tensor, positions: torch.Tensor, rotary: RotaryConfig) -> torch.Tensor:
    """x [tokens, .., d] with the first rotary.dim channels of d turned by their positions [tokens], in float32.

    Channel i is paired with i + dim / 2; the pair turns by position / factor x theta^(-2 i / dim).
    """
    half = rotary.dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=x.device) / half
    angles = positions.float()[:, None] / rotary.factor / rotary.theta**exponents
    shape = (len(positions), *[1] * (x.dim() - 2), half)
    cos, sin = angles.cos().view(shape), angles.sin().view(shape)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.float(), second.float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(t.to(x.dtype) for t in turned), rest], dim=-1)
