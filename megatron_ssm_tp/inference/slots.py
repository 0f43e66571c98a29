"""Slots: what one request keeps on the device while it runs, all of constant size; and the tensors that hold them.

Every tensor has a row for each slot and one more, which stands for no slot: index -1 is padding, in kernels nothing is
read or written for it, and what indexing in torch writes there nobody reads.
"""

from collections.abc import Sequence

import torch

from ..config import ModelConfig
from ..ops.choose import kernels_can_take
from ..partition.layout import state_bytes, state_shapes
from .prefix_cache import Snapshot
from .sampling import RowParams, SamplingNeeds, sample
from .transfers import to_device

END_IDS = 8  # of a request, that are looked for on the device; the host looks for all of them


class SlotTable:
    """States and sampling of `slots` requests on one rank.

    Args:
        config: of a model whose layers are all SSMs.
        slots: requests that can run at once.
        dtype, ssm_dtype: of the convolutions' states, and of the recurrences'.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: int,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        ssm_dtype: torch.dtype,
    ) -> None:
        rows, (conv, ssm) = slots + 1, state_shapes(config.mixer, tp)
        self.slots, self.device, self._vocab_size = slots, device, config.vocab_size
        self.conv = torch.zeros(config.ssm_states, rows, *conv, device=device, dtype=dtype)
        self.ssm = torch.zeros(config.ssm_states, rows, *ssm, device=device, dtype=ssm_dtype)
        self.params = RowParams.blank(rows, device)
        self.next_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.counts = torch.zeros_like(self.next_token)  # tokens generated
        self.limits = torch.zeros_like(self.next_token)  # and how many at most
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)
        self.end_ids = torch.full((rows, END_IDS), -1, dtype=torch.int64, device=device)
        self._seen: torch.Tensor | None = None

    @staticmethod
    def bytes_of(config: ModelConfig, tp: int, slots: int, dtype: torch.dtype, ssm_dtype: torch.dtype) -> int:
        """Bytes of the states on one rank."""
        return (slots + 1) * state_bytes(config, tp, dtype.itemsize, ssm_dtype.itemsize)

    def mamba_states_cache(self, cache_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """conv and ssm states [slots + 1, ..] of the mixer of that number, from 1."""
        return self.conv[cache_number - 1], self.ssm[cache_number - 1]

    @property
    def seen(self) -> torch.Tensor:
        """bool [slots + 1, vocab_size]: tokens of prompt and answer; made when a penalty first asks."""
        if self._seen is None:
            self._seen = torch.zeros(self.slots + 1, self._vocab_size, dtype=torch.bool, device=self.device)
        return self._seen

    def snapshot(self, slot: int) -> Snapshot:
        """A copy of a slot's states."""
        return Snapshot(self.conv[:, slot].clone(), self.ssm[:, slot].clone())

    def fits(self, states: Snapshot) -> bool:
        """Whether these are a slot's states: of this table's shapes and dtypes."""
        pairs = ((states.conv, self.conv), (states.ssm, self.ssm))
        return all(one.dtype == all_.dtype and one.shape == all_[:, 0].shape for one, all_ in pairs)

    def restore(self, slot: int, states: Snapshot | None) -> None:
        """Give a slot these states; None: those before any token, which are zero."""
        self.conv[:, slot] = 0 if states is None else states.conv
        self.ssm[:, slot] = 0 if states is None else states.ssm

    def begin(
        self,
        slot: int,
        tokens: Sequence[int],
        sampling: dict[str, float],
        limit: int,
        end_ids: Sequence[int],
        states: Snapshot | None = None,
    ) -> None:
        """A new request in `slot`, see `restore`.

        Args:
            tokens: of its conversation, for penalties.
            sampling: a value for each field of RowParams.
            limit: tokens to generate at most.
        """
        self.restore(slot, states)
        for name, value in sampling.items():
            getattr(self.params, name)[slot] = value
        self.counts[slot], self.limits[slot], self.alive[slot] = 0, limit, True
        ids = [*end_ids, *[-1] * END_IDS][:END_IDS]
        self.end_ids[slot] = to_device(ids, self.device)
        if sampling["repetition_penalty"] != 1:
            self.seen[slot] = False
            seen = to_device(tokens, self.device)
            self.seen[slot].index_put_((seen,), torch.ones_like(seen, dtype=torch.bool))

    def end(self, slot: int) -> None:
        """Nothing more is generated in `slot`."""
        self.alive[slot] = False

    def live(self, slots: torch.Tensor) -> torch.Tensor:
        """`slots` int64 [rows], -1 in the place of those whose answer is over."""
        return torch.where(self.alive[slots], slots, -1)

    def choose(
        self, logits: torch.Tensor, slots: torch.Tensor, needs: SamplingNeeds
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next token of each slot from logits [rows, vocab_size], and what follows from it for the slot.

        Returns:
            int64 [rows], -1 where the answer was over before; and log-probabilities float32 [rows], if asked for.
        """
        params = None if needs.greedy else self.params.at(slots)
        seen = self.seen[slots] if needs.penalized else None
        tokens, log_probs = sample(logits, params, self.counts[slots] if needs.random else None, needs, seen)
        if needs.penalized:
            # not `= True`, a value of the host, which no graph takes
            self.seen.index_put_((slots, tokens), torch.ones_like(tokens, dtype=torch.bool))
        return self.settle(tokens, slots), log_probs

    def settle(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Note what follows from the tokens for their slots. Returns them, -1 where the answer was over before."""
        if kernels_can_take(tokens):
            from .settle_triton import settle

            return settle(tokens, slots, self.end_ids, self.limits, self.counts, self.next_token, self.alive)
        alive = self.alive[slots]
        counts = self.counts[slots] + alive
        over = (tokens[:, None] == self.end_ids[slots]).any(-1) | (counts >= self.limits[slots])
        self.counts[slots], self.next_token[slots], self.alive[slots] = counts, tokens, alive & ~over
        return torch.where(alive, tokens, -1)
