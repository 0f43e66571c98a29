"""What SSM mixers ask a dynamic context for: which tokens of a pass are whose, and where their states lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class StateCache(Protocol):
    """Slots of state, as Megatron's DynamicInferenceContext has them."""

    def mamba_states_cache(self, cache_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """conv [slots, D/p, K] and ssm [slots, ..] of the mixer of that number, from 1."""


@dataclass(frozen=True)
class Counts:
    """Of a pass: one token of each decoding request comes first, then parts of prompts; `token_count` of both."""

    decode_req_count: int
    prefill_req_count: int
    token_count: int


@dataclass(frozen=True)
class Slots:
    """int [requests] each: a decoding request of -1 is padding, whose state is neither read nor kept."""

    batch_indices_decode: torch.Tensor | None
    batch_indices_prefill: torch.Tensor | None
    cu_seqlens: torch.Tensor | None  # int [prompts + 1], where these begin and end behind the decoding requests' tokens


@dataclass(frozen=True)
class PassContext:
    """A pass over slots of state; in the place of a Megatron context wherever there are SSM mixers alone.

    `lengths`: tokens of each prompt of this pass, where the host knows them. `at_most`: of the longest, where it is
    all that the host knows.
    """

    cache: StateCache
    batch_dimensions: Counts
    mamba_metadata: Slots
    lengths: Sequence[int] | None = None
    at_most: int | None = None
    mamba_slot_allocator = None
    num_speculative_tokens = 0

    @property
    def longest(self) -> int | None:
        """Tokens of the longest prompt of this pass, or more; None: not known."""
        return max(self.lengths) if self.lengths else self.at_most

    def is_dynamic_batching(self) -> bool:
        return True

    def is_static_batching(self) -> bool:
        return False

    def mamba_states_cache(self, cache_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.mamba_states_cache(cache_number)
