"""Agreement between ranks: what one cannot do, or the loss of one, ends all with one message and without a hang."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator

import torch.distributed as dist

from .errors import PeerLostError, UserError


def agree[T](step: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run `step` on every rank of `group`; if it fails on any, fail on all.

    A file that only one node cannot see thus ends the run everywhere. Steps must not communicate.

    Raises:
        UserError: the first rank's that has one.
        PeerLostError: a rank ended.
        RuntimeError: another rank failed by something else; that rank raises it as it is.
    """
    result, error = None, None
    try:
        result = step()
    except Exception as failure:
        error = failure
    if group.size() > 1:
        message = error if isinstance(error, UserError) or error is None else f"{type(error).__name__}: {error}"
        messages: list[UserError | str | None] = [None] * group.size()
        with lost_peers_reported():
            dist.all_gather_object(messages, message, group=group)
        first = next((found for found in messages if isinstance(found, UserError)), None)
        if first is not None:
            raise first
        if error is None:
            for rank, found in enumerate(messages):
                if found is not None:
                    raise RuntimeError(f"rank {rank} failed: {found}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # no error: step returned


def check_same(field: str, value: str, group: dist.ProcessGroup) -> None:
    """Raises UserError unless every rank of `group` has the same `value`: files may differ from node to node."""
    check_all_same({field: value}, group)


def check_all_same(values: dict[str, str], group: dist.ProcessGroup) -> None:
    """`check_same` of several fields, in their order; every rank calls it with the same first field."""
    if group.size() == 1:
        return
    found: list[dict[str, str]] = [{}] * group.size()
    with lost_peers_reported():
        dist.all_gather_object(found, values, group=group)
    for field in found[0]:
        for rank, other in enumerate(found):
            if other.get(field) != found[0][field]:
                raise UserError(field, f"that of rank {rank}", "differs from rank 0's", "the same on all ranks")


@contextlib.contextmanager
def lost_peers_reported() -> Iterator[None]:
    """Turn the errors that collectives raise when a peer is gone into PeerLostError, one line."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error) or not _of_a_collective(error):
            raise
        raise PeerLostError(lost(str(error).strip().splitlines()[0])) from error


def _of_a_collective(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors
    signs = ("gloo", "Connection closed by peer", "Connection reset")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def lost(reason: str) -> str:
    """The line that a rank says which has lost another; gloo's reasons begin with a place in its source."""
    reason = re.sub(r"^\[[^\]]*\.(cc|h):\d+\] ", "", reason)
    rank = dist.get_rank() if dist.is_initialized() else os.environ.get("RANK", 0)
    return f"rank {rank}: another rank ended or cannot be reached ({reason})"
