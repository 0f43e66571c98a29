"""Noticing that another rank is gone, so that nobody waits for it forever."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from ..errors import PeerLostError

# How long a step may still run once the neighbour's process has ended: it may have ended well, a step ahead of us.
GRACE_SECONDS = 5.0
_CONNECT_SECONDS = 10.0


class PeerWatch:
    """Ends this process when its neighbour has ended in the middle of a step.

    gloo's collectives fail by themselves when a peer's connection closes. NCCL's kernels wait for it, up to a time-out
    of minutes. So each rank keeps a TCP connection to the next one over which nothing is sent: what arrives is its end.
    The rank before notices in turn. Where no connection can be made, the launcher alone notices.

    Args:
        group: the tensor-parallel group; all its ranks construct one at the same time.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._neighbour = (group.rank() + 1) % group.size()
        self._step_began: float | None = None
        with socket.create_server((_own_address(), 0)) as listener:
            listener.settimeout(_CONNECT_SECONDS)
            addresses: list[tuple[str, int] | None] = [None] * group.size()
            dist.all_gather_object(addresses, listener.getsockname(), group=group)
            try:
                self._next = socket.create_connection(addresses[self._neighbour], timeout=_CONNECT_SECONDS)
                self._before, _ = listener.accept()
            except OSError:
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

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            self._next.recv(1)
        ended = time.monotonic()
        while True:
            began = self._step_began
            if began is not None and time.monotonic() - max(began, ended) > GRACE_SECONDS:
                print(f"error: {_lost(f'rank {self._neighbour} is gone')}", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.1)


def _own_address() -> str:
    """This machine's address as the others reach it: that of the route to the launcher's MASTER_ADDR."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


@contextlib.contextmanager
def lost_peers_reported() -> Iterator[None]:
    """Turn the errors that collectives raise when a peer is gone into PeerLostError, one line."""
    try:
        yield
    except dist.DistError as error:
        raise _peer_lost(error) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("gloo", "Connection closed by peer", "NCCL", "Connection reset")):
            raise
        raise _peer_lost(error) from error


def _peer_lost(error: Exception) -> PeerLostError:
    return PeerLostError(_lost(str(error).strip().splitlines()[0]))


def _lost(reason: str) -> str:
    return f"rank {dist.get_rank()}: another rank ended or cannot be reached ({reason})"
