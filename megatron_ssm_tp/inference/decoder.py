"""Bursts of decoding steps that the host does not look into: on GPUs a step is one CUDA graph, replayed.

A step reads each row's token and state, makes the next and says whether the answer goes on; rows whose answer is over
are masked on the device, so that the host may launch further steps before it has seen what came of the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist

from ..comm import symmetric
from ..comm.autocast import allreduce_autocast, book_of, is_decided
from ..comm.recipe_book import RecipeBook
from ..comm.recipes import recipe_by_name
from ..layers.model import SSMModel
from ..layers.pass_context import Counts, PassContext, Slots
from ..layers.row_parallel import RecipeRowParallelLinear
from .sampling import SamplingNeeds
from .slots import SlotTable

_WARM_UPS = 2


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


class Decoder:
    """Decodes slots of a table.

    Args:
        longest: steps of a burst at most.
        graphs: replay CUDA graphs, made when a batch size and what it needs are first seen; else launch every kernel.
    """

    def __init__(self, model: SSMModel, table: SlotTable, longest: int, graphs: bool) -> None:
        self.model, self.table, self.longest = model, table, longest
        self._group = model.pg_collection.tp
        self._sizes = ladder(table.slots)
        self._rows: dict[int, _Rows] = {}
        self._graphs: dict[tuple[int, SamplingNeeds, str], torch.cuda.CUDAGraph] | None = {} if graphs else None
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._linears = [module for module in model.modules() if isinstance(module, RecipeRowParallelLinear)]
        self._unasked = _low_latency_book(model.config.params_dtype, self._group, table.device)

    def burst(self, slots: Sequence[int], steps: int, needs: SamplingNeeds) -> Emitted:
        """`steps` more tokens of each of `slots`, or as many as their answers have; returns before they are there."""
        device, count = self.table.device, len(slots)
        size = count if self._graphs is None else next(size for size in self._sizes if size >= count)
        if size not in self._rows:
            self._rows[size] = _Rows(size, self.longest, device)
        rows = self._rows[size]
        step = self._step_of(rows, needs, self._book())
        rows.slots.copy_(self.table.live(to_device([*slots, *[-1] * (size - count)], device)))
        rows.step.zero_()
        for _ in range(steps):
            step()
        return self.emitted(rows.tokens[:steps], rows.log_probs[:steps] if needs.log_probs else None)

    def emitted(self, tokens: torch.Tensor, log_probs: torch.Tensor | None) -> Emitted:
        """Tokens [steps, rows] of all ranks on their way to this host."""
        digests = None
        if self._group.size() > 1:
            places = torch.arange(1, tokens.numel() + 1, device=tokens.device).view(tokens.shape)
            digest = (tokens * places).sum()
            digests = torch.stack([digest, -digest])
            dist.all_reduce(digests, op=dist.ReduceOp.MAX, group=self._group)
        if tokens.device.type == "cpu":
            return Emitted(tokens.clone(), None if log_probs is None else log_probs.clone(), digests, None)
        on_host = [None if t is None else _to_host(t) for t in (tokens, log_probs, digests)]
        arrived = torch.cuda.Event()
        arrived.record()
        return Emitted(*on_host, arrived)

    def _book(self) -> RecipeBook | None:
        """How sums travel now: as an allreduce_autocast or the model's recipes say, or as suits decoding."""
        own = next((linear.recipes for linear in self._linears if linear.recipes is not None), None)
        asked = own is not None or is_decided(self._group)
        return book_of(self._group, own) if asked else self._unasked

    def _step_of(self, rows: _Rows, needs: SamplingNeeds, book: RecipeBook | None) -> Callable[[], object]:
        if self._graphs is None:
            return lambda: self._step(rows, needs, book)
        key = (rows.slots.numel(), needs, "" if book is None else book.fingerprint())
        if key not in self._graphs:
            self._graphs[key] = self._captured(rows, needs, book)
        return self._graphs[key].replay

    def _captured(self, rows: _Rows, needs: SamplingNeeds, book: RecipeBook | None) -> torch.cuda.CUDAGraph:
        """The graph of a step. What runs before it is captured compiles the kernels, on rows that are all padding."""
        rows.slots.fill_(-1)
        stream = torch.cuda.Stream(self.table.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                rows.step.zero_()
                self._step(rows, needs, book)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(rows, needs, book)
        return graph

    def _step(self, rows: _Rows, needs: SamplingNeeds, book: RecipeBook | None) -> None:
        slots, table = rows.slots, self.table
        count = slots.numel()
        context = PassContext(table, Counts(count, 0, count), Slots(slots, None, None))
        with allreduce_autocast(enabled=book is not None, recipe=book):
            logits = self.model.logits_of_pass(table.next_token[slots], context)
        tokens, log_probs = table.choose(logits, slots, needs)
        rows.tokens.index_copy_(0, rows.step, tokens[None])
        if log_probs is not None:
            rows.log_probs.index_copy_(0, rows.step, log_probs[None])
        rows.step += 1
        slots.copy_(table.live(slots))


def _low_latency_book(dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device) -> RecipeBook | None:
    """16-bit sums by kernels of ours in the place of NCCL's, x_proj's too: made in float32 and rounded once.

    In a graph NCCL's would go to a stream of its own and back, twice a layer, and take the host longer to launch than
    the step lasts. None: values are not of 16 bits, or peers' memory cannot be written here. A collective call.
    """
    recipe = recipe_by_name("bf16")
    if device.type != "cuda" or group.size() == 1 or dtype != torch.bfloat16:
        return None
    if not symmetric.supports(torch.empty(0, dtype=dtype, device=device), group, recipe)[0]:
        return None
    matchers = {
        name: {"type": "glob", "pattern": pattern, "config": "all", "enabled": True}
        for name, pattern in (("x_proj", "*.x_proj"), ("others", "*"))
    }
    return RecipeBook.from_config_dict({"configs": {"all": {"recipe": "bf16"}}, "matchers": matchers})


def to_device(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64, without waiting for the device."""
    host = torch.tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
