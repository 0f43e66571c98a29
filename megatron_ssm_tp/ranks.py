"""Agreement between ranks: what one of them cannot do ends all of them, with one message and without a hang."""

from collections.abc import Callable

import torch.distributed as dist

from .errors import UserError


def agree[T](step: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run `step` on every rank of `group`; if it fails on any, fail on all.

    A file that only one node cannot see thus ends the run everywhere. Steps must not communicate.

    Raises:
        UserError: the first rank's that has one.
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
