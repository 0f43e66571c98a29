"""Noticing that another rank is gone, so that nobody waits for it forever."""

import contextlib
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import torch.distributed as dist

from ..ranks import lost

# How long a step may still run once the neighbour's process has ended: it may have ended well, a step ahead of us.
GRACE_SECONDS = 5.0
_CONNECT_SECONDS = 10.0
_LOST = b"!"  # sent by a rank that ends because its own neighbour was lost: no grace is needed


class PeerWatch:
    """Ends this process (status 1, one line on stderr) when its neighbour has ended in the middle of a step.

    gloo's collectives fail by themselves when a peer's connection closes. NCCL's kernels wait for it, up to a time-out
    of minutes, in a place that Python cannot leave. So each rank keeps a TCP connection to the next one and waits for
    its end; the rank that notices tells the one before it. Where no connection can be made, it warns, and the launcher
    alone notices.

    Args:
        group: the tensor-parallel group; all its ranks construct one at the same time.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._neighbour = (group.rank() + 1) % group.size()
        self._step_began: float | None = None
        self._closed = threading.Event()
        with socket.create_server((_own_address(), 0)) as listener:
            listener.settimeout(_CONNECT_SECONDS)
            addresses: list[tuple[str, int] | None] = [None] * group.size()
            dist.all_gather_object(addresses, listener.getsockname(), group=group)
            try:
                self._next = socket.create_connection(addresses[self._neighbour], timeout=_CONNECT_SECONDS)
                self._before, _ = listener.accept()
            except OSError as error:
                warnings.warn(f"ranks cannot watch each other ({error}): only the launcher sees one die", stacklevel=2)
                self._closed.set()
                return
        self._next.settimeout(None)
        threading.Thread(target=self._watch, name="peer-watch", daemon=True).start()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around what cannot end without the other ranks."""
        self._step_began = time.monotonic()
        try:
            yield
        finally:
            self._step_began = None

    def close(self) -> None:
        """Stop watching and being watched."""
        if not self._closed.is_set():
            self._closed.set()
            self._next.shutdown(socket.SHUT_RDWR)
            self._next.close()
            self._before.close()

    def _watch(self) -> None:
        told = b""
        with contextlib.suppress(OSError):
            told = self._next.recv(1)
        ended = time.monotonic()
        grace = 0.0 if told == _LOST else GRACE_SECONDS
        while not self._closed.wait(0.1):
            began = self._step_began
            if began is not None and time.monotonic() - max(began, ended) > grace:
                with contextlib.suppress(OSError):
                    self._before.send(_LOST)
                print(f"error: {lost(f'rank {self._neighbour} is gone')}", file=sys.stderr, flush=True)
                os._exit(1)


def _own_address() -> str:
    """This machine's address as the others reach it: that of the route to the launcher's MASTER_ADDR."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]
