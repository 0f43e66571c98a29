"""CUDA graphs of what engines repeat: made when first asked for, in one pool of memory, replayed one after another."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

_WARM_UPS = 2


class Graph[T](NamedTuple):
    """`result` is what the captured function returned: tensors that each replay fills anew."""

    replay: Callable[[], object]
    result: T


class Graphs:
    """Graphs by what they are known by."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._made: dict[Hashable, Graph] = {}

    def of[T](self, key: Hashable, run: Callable[[], T], blank: Callable[[], object]) -> Graph[T]:
        """The graph of `run`, which reads and writes tensors that stay where they are.

        Args:
            blank: called before each run, captured or not: fills what `run` reads with what does no harm. Runs before
                the captured one compile kernels.
        """
        if key not in self._made:
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    blank()
                    run()
                blank()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's own threads may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
            graph.replay()  # what its first launch takes of the host's memory is taken now, and not under load
            self._made[key] = Graph(graph.replay, result)
        return self._made[key]
