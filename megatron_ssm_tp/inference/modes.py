"""What engines have in common: one run at a time, and Megatron's inference flag."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.inference.utils import InferenceMode

from ..errors import UserError


class OneRun:
    """Base of engines, which run the model for one caller at a time."""

    def __init__(self) -> None:
        self._one_run = threading.Lock()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing else runs the model meanwhile. Raises UserError if something does."""
        if not self._one_run.acquire(blocking=False):
            raise UserError("stream", "another", "is still open", "consume it, or close() it, before the next")
        try:
            yield
        finally:
            self._one_run.release()


@contextmanager
def inference_active() -> Iterator[None]:
    """Megatron's process-wide inference flag, which mixers read: on inside, and after it as it was."""
    was_active = InferenceMode.is_active()
    InferenceMode.set_active()
    try:
        yield
    finally:
        if not was_active:
            InferenceMode.unset_active()
