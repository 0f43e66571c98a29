"""Forward passes over prompts, or parts of them, packed end to end.

A short pass takes the host longer to launch than the GPU to run, so that on GPUs short ones are CUDA graphs, for some
numbers of tokens and of prompts (pass_sizes.py) to which they are padded: further prompts are of no tokens, with the
row of states that no request has, and one more with that row has all tokens behind the last. So every row of a pass is
written: blocks of quantized sums reach from one into the next. Passes that hide reductions (layers/overlap.py) are
launched as they are.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from ..comm.autocast import allreduce_autocast
from ..layers.model import SSMModel
from ..layers.overlap import overlap_from
from ..layers.pass_context import Counts, PassContext, Slots
from .graphs import Graphs
from .pass_sizes import PassSizes
from .slots import SlotTable
from .small_sums import SmallSums
from .transfers import to_device


class Passes:
    """Passes of a model over the slots of a table.

    Args:
        graphs: None: every kernel is launched, and nothing padded.
    """

    def __init__(self, model: SSMModel, table: SlotTable, sums: SmallSums, graphs: Graphs | None) -> None:
        self.model, self.table, self._sums, self._graphs = model, table, sums, graphs
        self.sizes, self._overlaps = PassSizes.of(model.decoder.layers), overlap_from(model)
        self._padded: dict[tuple[int, int], _Padded] = {}

    def logits(self, parts: Sequence[tuple[int, Sequence[int]]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the tokens of each (slot, tokens): logits [count, vocab_size] behind the first `count` parts, which the
        next pass may overwrite, and all slots [parts]."""
        if self._graphs is not None:
            size = self.size_of(parts)
            if size is not None:
                return self.padded(parts, count, *size)
        device, lengths = self.table.device, tuple(len(tokens) for _, tokens in parts)
        ends = list(accumulate(lengths))
        slots = to_device([slot for slot, _ in parts], device)
        cu_seqlens = to_device([0, *ends], device).to(torch.int32)
        tokens = to_device([token for _, part in parts for token in part], device)
        context = PassContext(self.table, Counts(0, len(parts), len(tokens)), Slots(None, slots, cu_seqlens), lengths)
        last = to_device([end - 1 for end in ends[:count]], device)
        return self.model.logits_of_pass(tokens, context, last), slots

    def size_of(self, parts: Sequence[tuple[int, Sequence[int]]]) -> tuple[int, int] | None:
        """Tokens and prompts of the graph for these parts; None: there is none."""
        size = self.sizes.holding(sum(len(tokens) for _, tokens in parts), len(parts))
        return size if size is not None and self._is_plain(size) else None

    def _is_plain(self, size: tuple[int, int]) -> bool:
        """Whether a pass of that size would hide no reductions."""
        return self._overlaps is None or size[0] < self._overlaps

    def warm_up(self, max_tokens: int) -> None:
        """Make the graphs of passes up to `max_tokens`, if any, and have kernels compiled for one of so many."""
        for size in self.sizes.up_to(max_tokens) if self._graphs is not None else ():
            if self._is_plain(size):
                self.padded([], 0, *size)
        nobody = self.table.slots
        self.logits([(nobody, [0] * max_tokens)], 1)
        self.logits([(nobody, [0] * max_tokens), (nobody, [0])], 1)

    def padded(
        self, parts: Sequence[tuple[int, Sequence[int]]], count: int, rows: int, prompts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `logits`, in a pass of so many tokens and prompts."""
        if (rows, prompts) not in self._padded:
            self._padded[rows, prompts] = _Padded(rows, prompts, self.table)
        given, book = self._padded[rows, prompts], self._sums.book()

        def run() -> torch.Tensor:
            with allreduce_autocast(enabled=book is not None, recipe=book):
                return self.model.logits_of_pass(given.tokens, given.context, given.last)

        if self._graphs is None:
            given.fill(parts)
            found = run()
        else:
            key = ("pass", rows, prompts, "" if book is None else book.fingerprint())
            graph = self._graphs.of(key, run, given.blank)
            given.fill(parts)
            graph.replay()
            found = graph.result
        return found[:count], given.slots[: len(parts)]


class _Padded:
    """What a pass of so many tokens and prompts reads, filled anew for each."""

    def __init__(self, rows: int, prompts: int, table: SlotTable) -> None:
        self._nobody, self._prompts = table.slots, prompts
        # One tensor, so that one copy fills all: tokens, slots, the rows behind which logits are wanted, bounds.
        sizes = [rows, prompts + 1, prompts, prompts + 2]
        self._all = torch.zeros(sum(sizes), dtype=torch.int64, device=table.device)
        self.tokens, self.slots, self.last, self._bounds = self._all.split(sizes)
        self._cu_seqlens = torch.zeros(prompts + 2, dtype=torch.int32, device=table.device)
        counts, slots = Counts(0, prompts + 1, rows), Slots(None, self.slots, self._cu_seqlens)
        # A single prompt is taken to fill the pass; of several the longest is not known.
        self.context = PassContext(table, counts, slots, at_most=rows if prompts == 1 else None)

    def blank(self) -> None:
        """No tokens, of nobody."""
        self.fill([])

    def fill(self, parts: Sequence[tuple[int, Sequence[int]]]) -> None:
        none = self._prompts - len(parts) + 1
        ends = list(accumulate(len(tokens) for _, tokens in parts))
        ids = [token for _, tokens in parts for token in tokens]
        values = [*ids, *[0] * (len(self.tokens) - len(ids))]
        values += [*[slot for slot, _ in parts], *[self._nobody] * none]
        values += [*[end - 1 for end in ends], *[0] * (none - 1)]
        values += [0, *ends, *[len(ids)] * (none - 1), len(self.tokens)]
        self._all.copy_(to_device(values, self._all.device))
        self._cu_seqlens.copy_(self._bounds)
