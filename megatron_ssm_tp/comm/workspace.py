"""A group's memory for the symmetric backend: where in each rank's buffer the others write."""

from dataclasses import dataclass, field

import torch

from .recipes import AllReduceRecipe
from .tuning import Launch

CODES_BYTES = 144 << 20  # of codes that a rank can receive in one call; larger tensors are reduced in pieces
WORDS_SLOT_BYTES = 4 << 20
EXACT_SLOT_BYTES = 2 << 20
EXACT_VALUES = EXACT_SLOT_BYTES // 8
FLAGS = 1 << 17  # flags a half


@dataclass(frozen=True, eq=False)
class Workspace:
    """A group's buffers: two halves, each with a slot for what every rank, this one too, sends.

    codes    codes_bytes                  one-shot: a slot a rank; two-shot: of parts and, from sums_at on, of sums
    words    ranks * WORDS_SLOT_BYTES
    exact    ranks * EXACT_SLOT_BYTES

    Args:
        rank, ranks: this rank and their number.
        buffers, flags: addresses of all ranks' buffers of 2 * half_bytes, and of their flags, which are int32
            [2, FLAGS]; all zeros before the first call.
        counters: int32 [2], zeros before the first call.
        patience: polls before a peer is given up.
        memory: whatever keeps the buffers alive.
        codes_bytes, exact_values: what one call of a kernel can receive.
    """

    rank: int
    ranks: int
    buffers: tuple[int, ...]
    flags: tuple[int, ...]
    counters: torch.Tensor
    patience: int
    memory: object
    codes_bytes: int = CODES_BYTES
    exact_values: int = EXACT_VALUES
    calls: dict = field(init=False, default_factory=dict)  # of symmetric_launch, by shapes

    @staticmethod
    def bytes_of_half(ranks: int, codes_bytes: int = CODES_BYTES) -> int:
        return codes_bytes + ranks * (WORDS_SLOT_BYTES + EXACT_SLOT_BYTES)

    @property
    def half_bytes(self) -> int:
        return self.bytes_of_half(self.ranks, self.codes_bytes)

    @property
    def sums_at(self) -> int:
        return self.codes_bytes // 32 * 16

    @property
    def words_at(self) -> int:
        return self.codes_bytes

    @property
    def exact_at(self) -> int:
        return self.codes_bytes + self.ranks * WORDS_SLOT_BYTES

    def slot_bytes(self, way: str) -> int:
        if way == "words":
            return WORDS_SLOT_BYTES
        region = self.sums_at if way == "two-shot" else self.codes_bytes
        return region // self.ranks // 16 * 16

    def blocks_at_a_time(self, recipe: AllReduceRecipe, launch: Launch, tile_blocks: int) -> int:
        """Blocks that one call of a kernel can reduce: whole tiles, at least one."""
        block_bytes = recipe.block_bytes + recipe.scale_bytes
        if launch.way == "words":
            tiles, parts = WORDS_SLOT_BYTES // (2 * block_bytes * tile_blocks), 1
        else:
            trips, parts = (2, self.ranks) if launch.way == "two-shot" else (1, 1)
            tiles = self.slot_bytes(launch.way) // (block_bytes * tile_blocks)
            tiles = min(tiles, FLAGS // (trips * self.ranks))
        return tiles * parts * tile_blocks
