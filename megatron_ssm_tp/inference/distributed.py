"""The ranks of one tensor-parallel run: starting them, their groups, agreeing on errors."""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from ..errors import UserError


def local_device() -> torch.device:
    """This process's GPU (by torchrun's LOCAL_RANK), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        legal = f"at most {torch.cuda.device_count()} processes on this machine"
        raise UserError("local rank", local_rank, "has no GPU", legal)
    return torch.device("cuda", local_rank)


def start(device: torch.device) -> None:
    """Initialize torch.distributed unless that is done: from torchrun's environment, or alone in a plain process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def tensor_parallel_groups(tp: int | None) -> ProcessGroupCollection:
    """Megatron's groups with all ranks in one tensor-parallel group; reuses what the caller has initialized.

    Raises:
        UserError: `tp` is not the world size, or Megatron is already initialized with another.
    """
    world = dist.get_world_size()
    if tp is not None and tp != world:
        legal = f"{world}, the number of processes (torchrun --nproc-per-node)"
        raise UserError("tensor_model_parallel_size", tp, "is not the world size", legal)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if groups.tp.size() != world:
        legal = f"{groups.tp.size()}, as Megatron was initialized before"
        raise UserError("tensor_model_parallel_size", world, "differs from Megatron's own", legal)
    return groups


def agree[T](step: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run `step` on every rank of `group`; if it raises UserError on any, raise the first rank's on all.

    A file that only one node cannot see thus ends the run everywhere, with one message, instead of a hang.
    """
    result, error = None, None
    try:
        result = step()
    except UserError as mistake:
        error = mistake
    if group.size() > 1:
        errors: list[UserError | None] = [None] * group.size()
        dist.all_gather_object(errors, error, group=group)
        error = error or next((found for found in errors if found is not None), None)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # no error: step returned
