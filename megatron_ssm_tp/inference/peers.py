"""Noticing that another rank is gone, so that nobody waits for it forever."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import PeerLostError

# How long a step may still run once the neighbour's process has ended: it may have ended well, a step ahead of us.
GRACE_SECONDS = 5.0
_FOREVER = timedelta(days=365)


class PeerWatch:
    """Ends this process when its neighbour has ended in the middle of a step.

    gloo's collectives fail by themselves when a peer's connection closes. NCCL's kernels wait for it, up to a time-out
    of minutes. So each rank keeps a gloo connection on which it waits for a message of the next rank that never comes:
    what does come is the end of the connection. The next but one notices in turn.

    Args:
        ranks: those of the tensor-parallel group. Every rank of the world must construct one at the same time.
    """

    def __init__(self, ranks: list[int]) -> None:
        self._group = dist.new_group(ranks, backend="gloo", timeout=_FOREVER)
        rank = self._group.rank()
        self._neighbour = (rank + 1) % self._group.size()
        self._step_began: float | None = None
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
        with contextlib.suppress(RuntimeError):
            dist.recv(torch.empty(1), group=self._group, group_src=self._neighbour)
        ended = time.monotonic()
        while True:
            began = self._step_began
            if began is not None and time.monotonic() - max(began, ended) > GRACE_SECONDS:
                print(f"error: {_lost(f'rank {self._neighbour} is gone')}", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.1)


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
