"""Where the bytes of a payload lie.

A payload is uint8 [parts, part_bytes]. A part holds, one after the other,

    codes    uint8    [blocks, block_bytes]
    scales   float32  [blocks]                    (none for bf16)
    exact    the tensor's dtype                   values that travel beside the codes as they are
    padding  to a multiple of 16 bytes, which vector loads and views as float32 need

Block b of the flattened tensor is block b % blocks of part b // blocks; what the last block and the last part lack is
zeros.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from .recipes import AllReduceRecipe


@dataclass(frozen=True)
class Layout:
    """Where the bytes of a payload lie.

    Args:
        recipe: a format and its block size.
        values: numbers that are encoded.
        parts: parts that they are cut in.
        exact_bytes: bytes a part that travel as they are, a multiple of the dtype's.
    """

    recipe: AllReduceRecipe
    values: int
    parts: int = 1
    exact_bytes: int = 0

    @cached_property
    def blocks(self) -> int:
        """Blocks a part."""
        return -(-self.values // (self.recipe.block_size * self.parts))

    @cached_property
    def scales_at(self) -> int:
        return self.blocks * self.recipe.block_bytes

    @cached_property
    def exact_at(self) -> int:
        return self.scales_at + self.blocks * self.recipe.scale_bytes

    @cached_property
    def part_bytes(self) -> int:
        return -(-(self.exact_at + self.exact_bytes) // 16) * 16

    def one_part(self) -> "Layout":
        """The layout of a part by itself, all of whose blocks are in use."""
        return Layout(self.recipe, self.blocks * self.recipe.block_size, 1, self.exact_bytes)

    def exact(self, payload: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values that travel as they are: a view [parts, exact_bytes / itemsize]."""
        return payload[:, self.exact_at : self.exact_at + self.exact_bytes].view(dtype)
