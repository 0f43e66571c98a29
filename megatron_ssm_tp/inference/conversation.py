"""Conversations that are taken up again: what a request leaves in its slot, to begin another with, now or from disk."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..ranks import agree, check_same
from .prefix_cache import Snapshot


@dataclass(frozen=True)
class ConversationState:
    """All tokens of a conversation so far, and this rank's states after all of them but the last, which is unread.

    Its bytes do not grow with the conversation.
    """

    token_ids: list[int]
    snapshot: Snapshot


def save_state(state: ConversationState, directory: str | Path, group: dist.ProcessGroup) -> None:
    """Write each rank's part to a file of its own in `directory`, which is made if it is not there.

    Raises:
        UserError: it is no state, or the ranks' are of several conversations, or some rank cannot write there; the same
            on all.
    """
    file = _file(directory, group)
    partial = file.with_name(file.name + ".partial")

    def write() -> None:
        if not isinstance(state, ConversationState):
            raise UserError("state", type(state).__name__, "is no state", "that of an answer, of return_states=True")
        tensors = {"conv": state.snapshot.conv.cpu(), "ssm": state.snapshot.ssm.cpu()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, {"token_ids": json.dumps(state.token_ids)})
        except (OSError, SafetensorError) as error:
            problem = f"cannot be written ({_line(error)})"
            raise UserError("directory", str(directory), problem, "a folder that can be written to") from error

    try:
        agree(write, group)  # before any rank's part takes the place of an earlier one
        check_same("state", str(state.token_ids), group)
        partial.replace(file)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def load_state(directory: str | Path, device: torch.device, group: dist.ProcessGroup) -> ConversationState:
    """What `save_state` wrote with as many ranks.

    Raises:
        UserError: it is not there or cannot be read, or ranks find different conversations; the same on all.
    """
    file = _file(directory, group)

    def read() -> ConversationState:
        try:
            with safe_open(file, "pt", device=str(device)) as stored:
                token_ids = json.loads(stored.metadata()["token_ids"])
                return ConversationState(token_ids, Snapshot(stored.get_tensor("conv"), stored.get_tensor("ssm")))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            problem = f"{file.name} cannot be read ({_line(error)})"
            legal = f"a folder that save_state wrote with {group.size()} rank(s)"
            raise UserError("directory", str(directory), problem, legal) from error

    state = agree(read, group)
    check_same("conversation", str(state.token_ids), group)
    return state


def _file(directory: str | Path, group: dist.ProcessGroup) -> Path:
    return Path(directory) / f"rank-{group.rank()}-of-{group.size()}.safetensors"


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
