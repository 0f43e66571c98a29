"""A CUDA stream beside the current one, for sums that travel while products run."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


class SideStream:
    """The stream beside the current one of `device`; its work of few, early blocks goes first. On CPUs there is none,
    and what it is given runs where it stands."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream_of(device) if device.type == "cuda" else None

    def behind_current(self) -> AbstractContextManager:
        """Within it work goes to the side stream, behind what the current one has been given."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def made(self) -> torch.cuda.Event | None:
        """What to wait for before what the side stream has been given is read."""
        return None if self._stream is None else self._stream.record_event()


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all models: memory that a stream has used is kept for it."""
    return torch.cuda.Stream(device, priority=-1)
