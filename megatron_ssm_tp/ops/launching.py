"""What the operators that launch Triton kernels share: tensors as kernels read them, and prompts cut into chunks."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Chunks:
    """Packed prompts cut as lanes_triton.chunk_of cuts them, of which the host knows tokens and number alone.

    Args:
        tokens, sequences: of the prompts.
        size: tokens in a chunk, about.
    """

    tokens: int
    sequences: int
    size: int

    @property
    def cut(self) -> bool:
        """Whether a prompt may have several chunks: the shortest that is cut has 1.5."""
        return 2 * self.tokens >= 3 * self.size

    @property
    def programs(self) -> int:
        """As many as there are chunks of equal prompts."""
        return max(self.sequences, (self.tokens + self.size // 2) // self.size)

    @property
    def one_each(self) -> bool:
        """Whether there is a program for every chunk, whatever the prompts' lengths."""
        return not self.cut or self.sequences == 1

    @property
    def slots(self) -> int:
        """How many chunks there may be; 0 where none is of a prompt that is cut."""
        return self.tokens // self.size + self.sequences if self.cut else 0


def alike(tokens: int, sequences: int, longest: int | None) -> int:
    """As many sequences of the longest's length as have these tokens: a pass takes as long as its longest one, which
    short ones beside it do not make shorter. Where the host does not know it, all are taken to be alike."""
    return sequences if longest is None else max(1, min(sequences, tokens // longest))


def even_chunk(tokens: int, sequences: int, size: int) -> int:
    """About `size`, and such that each of equal sequences is cut into equal chunks; it is whole below 1.5 of these."""
    mean = -(-tokens // sequences)
    if 2 * mean < 3 * size:
        return max(size, mean)
    return -(-mean // round(mean / size))


def power_of_two(size: int) -> int:
    """The least that is no less than size. Triton's own function of the host's costs the host much more."""
    return 1 << (size - 1).bit_length()


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def row_unit(*strides: int) -> int:
    """8 where it divides all of these strides of rows, else 1: kernels are given strides in such units.

    Of an argument Triton knows no more than whether 16 divides it. Of rows of 5416 = 8 x 677 values (in_proj's of
    mamba2-2.7b on two ranks) it would load each 16-bit value by itself.
    """
    return 1 if any(stride % 8 for stride in strides) else 8


def last_axis_dense(x: torch.Tensor) -> torch.Tensor:
    """x, copied if its last axis has gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_states(states: torch.Tensor) -> torch.Tensor:
    """states [slots, D, ..], copied if a slot has gaps; slots may be any number of values apart."""
    return states if states[0].is_contiguous() else states.contiguous()
