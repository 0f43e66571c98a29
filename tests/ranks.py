"""Real gloo ranks that live as long as the test session: their imports cost more than most tests."""

import multiprocessing as mp
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _serve(rank: int, size: int, store: str, tasks: mp.Queue, results: mp.Queue) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Fills torch.empty with NaN: whoever reads memory that nobody wrote is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (task := tasks.get()) is not None:
        function, args, kwargs = task
        try:
            results.put((rank, function(*args, **kwargs), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))


class Ranks:
    """`size` processes in one gloo group. `run` calls a function on all of them and returns their results by rank."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self.size = size
        self._store = Path(tempfile.mkdtemp()) / "store"
        self._tasks = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, size, str(self._store), self._tasks[rank], self._results))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, *args: Any, timeout: float = 240, **kwargs: Any) -> list[Any]:
        """Raises AssertionError with a rank's traceback if it failed, or if results are not all there in time."""
        for tasks in self._tasks:
            tasks.put((function, args, kwargs))
        return self.collect(range(self.size), timeout)

    def collect(self, ranks: range | list[int], timeout: float) -> list[Any]:
        found: dict[int, Any] = {}
        errors: list[str] = []
        deadline = time.monotonic() + timeout
        while len(found) < len(ranks):
            try:
                rank, result, error = self._results.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                self.stop()
                raise AssertionError(f"no answer from ranks {set(ranks) - found.keys()} in {timeout} s") from None
            found[rank] = result
            if error is not None:
                errors.append(f"rank {rank} of {self.size}:\n{error}")
        assert not errors, "\n".join(errors)
        return [found[rank] for rank in ranks]

    def stop(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        deadline = time.monotonic() + 5  # for all of them together: ranks of a dead group do not answer
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
