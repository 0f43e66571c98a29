"""Run Megatron-Core's inference engine on a machine without CUDA, over gloo.

Megatron names torch.cuda in places that have nothing to do with a GPU: the device of a new tensor, pinned host memory,
events and streams around copies that are no copies here. Inside `megatron_on_cpu()` these names answer for the CPU.

It acts only where CUDA is absent, nests, and leaves everything as it found it. torch.cuda.is_available() stays False.
"""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

_PINNING_FACTORIES = ("empty", "full", "zeros", "ones", "empty_like", "full_like", "zeros_like", "tensor", "arange")


class CpuEvent:
    """torch.cuda.Event for work that is over when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "CpuEvent") -> float:
        """Milliseconds."""
        return (end._time - self._time) * 1e3


class CpuStream:
    """torch.cuda.Stream on a device that has no queues."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_event(self, event: CpuEvent) -> None: ...

    def wait_stream(self, stream: "CpuStream") -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        event = event or CpuEvent()
        event.record()
        return event

    def __enter__(self) -> "CpuStream":
        return self

    def __exit__(self, *exc: object) -> None: ...


def _without_pinning(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


def _itself(obj: Any, *args: Any, **kwargs: Any) -> Any:
    return obj


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _replacements() -> list[tuple[Any, str, Any]]:
    stream = CpuStream()
    cuda = {
        "current_device": lambda: torch.device("cpu"),
        "Event": CpuEvent,
        "Stream": CpuStream,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "synchronize": _nothing,
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
    }
    from megatron.core.inference.contexts import dynamic_context

    pinning = {name: _without_pinning(getattr(torch, name)) for name in _PINNING_FACTORIES}
    return [
        *((torch.cuda, name, value) for name, value in cuda.items()),
        *((torch, name, value) for name, value in pinning.items()),
        (torch.Tensor, "cuda", _itself),
        (dynamic_context, "triton_append_key_value_cache", None),  # Megatron then appends by indexing
        (torch.Tensor, "pin_memory", _itself),
    ]


@contextlib.contextmanager
def _null_rng_tracker() -> Iterator[None]:
    """Megatron's tracker of CUDA generators, replaced by its own inference variant that tracks nothing."""
    from megatron.core.tensor_parallel import random

    before = random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED
    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    try:
        yield
    finally:
        random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = before


_depth = 0


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Within the context Megatron's inference code runs on the CPU. Does nothing where CUDA is present."""
    global _depth
    if torch.cuda.is_available() or _depth:
        yield
        return
    _depth += 1
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, value in _replacements():
                stack.enter_context(mock.patch.object(owner, name, value))
            stack.enter_context(_null_rng_tracker())
            yield
    finally:
        _depth -= 1
