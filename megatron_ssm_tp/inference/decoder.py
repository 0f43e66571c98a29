"""Bursts of decoding steps that the host does not look into: on GPUs a step is one CUDA graph, replayed.

A step reads each row's token and state, makes the next and says whether the answer goes on; rows whose answer is over
are masked on the device, so that the host may launch further steps before it has seen what came of the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, product

import torch
import torch.distributed as dist

from ..comm.autocast import allreduce_autocast
from ..comm.recipe_book import RecipeBook
from ..layers.model import SSMModel
from ..layers.pass_context import Counts, PassContext, Slots
from .graphs import Graphs
from .sampling import SamplingNeeds, mix
from .slots import SlotTable
from .small_sums import SmallSums
from .transfers import to_device, to_host


def ladder(most: int) -> list[int]:
    """Batch sizes that graphs are made for: powers of two, eighths between them from 16 on, and `most`."""
    sizes = chain((1, 2, 4, 8), range(16, 64, 8), range(64, 256, 32), range(256, most, 64))
    return [*(size for size in sizes if size < most), most]


@dataclass
class Emitted:
    """What a burst of `steps` has generated, on its way to the host.

    Args:
        tokens: int64 [steps, rows], -1 behind the end of an answer; on the host once `wait` has returned.
        log_probs: float32 [steps, rows], or None.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor | None
    digests: torch.Tensor | None
    arrived: torch.cuda.Event | None

    def wait(self) -> None:
        """Until it is there.

        Raises:
            RuntimeError: the ranks have not chosen the same tokens; on all of them.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.digests is not None and self.digests[0] != -self.digests[1]:
            raise RuntimeError("the ranks have chosen different tokens: their logits or parameters are not the same")


class _Rows:
    """The tensors of a batch size that graphs read and write."""

    def __init__(self, rows: int, steps: int, device: torch.device) -> None:
        self.slots = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.full((steps, rows), -1, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(steps, rows, device=device)

    def blank(self) -> None:
        """Rows that are all padding."""
        self.slots.fill_(-1)
        self.step.zero_()


class Decoder:
    """Decodes slots of a table.

    Args:
        longest: steps of a burst at most.
        graphs: made when a batch size and what it needs are first seen; None: every kernel is launched.
    """

    def __init__(self, model: SSMModel, table: SlotTable, longest: int, sums: SmallSums, graphs: Graphs | None) -> None:
        self.model, self.table, self.longest, self._sums, self._graphs = model, table, longest, sums, graphs
        self._group = model.pg_collection.tp
        self._sizes = ladder(table.slots)
        self._rows: dict[int, _Rows] = {}

    def burst(self, slots: Sequence[int], steps: int, needs: SamplingNeeds) -> Emitted:
        """`steps` more tokens of each of `slots`, or as many as their answers have; returns before they are there."""
        device, count = self.table.device, len(slots)
        size = count if self._graphs is None else next(size for size in self._sizes if size >= count)
        rows = self._rows_of(size)
        step = self._step_of(rows, needs.rounded_up(), self._sums.book())
        rows.slots.copy_(self.table.live(to_device([*slots, *[-1] * (size - count)], device)))
        rows.step.zero_()
        for _ in range(steps):
            step()
        return self.emitted(rows.tokens[:steps], rows.log_probs[:steps] if needs.log_probs else None)

    def warm_up(self) -> None:
        """Make all graphs that bursts may ask for; without graphs have their kernels compiled, as far as sizes are
        alike."""
        sizes = self._sizes if self._graphs is not None else self._sizes[:1]
        for size, needs in product(sizes, SamplingNeeds.all_rounded()):
            step = self._step_of(self._rows_of(size), needs, self._sums.book())
            if self._graphs is None:
                self._rows_of(size).blank()
                step()

    def _rows_of(self, size: int) -> _Rows:
        if size not in self._rows:
            self._rows[size] = _Rows(size, self.longest, self.table.device)
        return self._rows[size]

    def emitted(self, tokens: torch.Tensor, log_probs: torch.Tensor | None) -> Emitted:
        """Tokens [steps, rows] of all ranks on their way to this host."""
        digests = None
        if self._group.size() > 1:
            places = torch.arange(1, tokens.numel() + 1, device=tokens.device).view(tokens.shape)
            digest = mix(mix(places) + tokens).sum()
            digests = torch.stack([digest, -digest])
            dist.all_reduce(digests, op=dist.ReduceOp.MAX, group=self._group)
        if tokens.device.type == "cpu":
            return Emitted(tokens.clone(), None if log_probs is None else log_probs.clone(), digests, None)
        on_host = [None if t is None else to_host(t) for t in (tokens, log_probs, digests)]
        arrived = torch.cuda.Event()
        arrived.record()
        return Emitted(*on_host, arrived)

    def _step_of(self, rows: _Rows, needs: SamplingNeeds, book: RecipeBook | None) -> Callable[[], object]:
        if self._graphs is None:
            return lambda: self._step(rows, needs, book)
        key = ("step", rows.slots.numel(), needs, "" if book is None else book.fingerprint())
        return self._graphs.of(key, lambda: self._step(rows, needs, book), rows.blank).replay

    def _step(self, rows: _Rows, needs: SamplingNeeds, book: RecipeBook | None) -> None:
        slots, table = rows.slots, self.table
        count = slots.numel()
        context = PassContext(table, Counts(count, 0, count), Slots(slots, None, None))
        with allreduce_autocast(enabled=book is not None, recipe=book):
            if needs.greedy and not needs.log_probs:
                likeliest, log_probs = self.model.likeliest_of_pass(table.next_token[slots], context), None
                tokens = table.settle(likeliest, slots)
            else:
                logits = self.model.logits_of_pass(table.next_token[slots], context)
                tokens, log_probs = table.choose(logits, slots, needs)
        rows.tokens.index_copy_(0, rows.step, tokens[None])
        if log_probs is not None:
            rows.log_probs.index_copy_(0, rows.step, log_probs[None])
        rows.step += 1
        slots.copy_(table.live(slots))
