"""The ranks of one tensor-parallel run: starting them, and their groups."""

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from ..errors import UserError
from ..ranks import lost_peers_reported


def local_device() -> torch.device:
    """This process's GPU (by torchrun's LOCAL_RANK), or the CPU where there is none.

    Raises:
        UserError: more processes on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if processes > gpus:
        legal = f"at most {gpus}, one for each GPU; or CUDA_VISIBLE_DEVICES= to run on the CPU"
        error = UserError("processes on this machine", processes, "are more than its GPUs", legal)
        error.of_one_rank = "LOCAL_WORLD_SIZE" not in os.environ
        raise error
    return torch.device("cuda", local_rank)


def join(tp: int | None) -> tuple[torch.device, ProcessGroupCollection]:
    """Start this rank and meet the others: its device, and Megatron's groups with all ranks in the tensor-parallel one.

    Raises:
        UserError: see local_device and tensor_parallel_groups.
        PeerLostError: the others could not be met.
    """
    device = local_device()
    _start(device)
    return device, tensor_parallel_groups(tp)


def _start(device: torch.device) -> None:
    """Initialize torch.distributed unless that is done: from torchrun's environment, or alone in a plain process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    with lost_peers_reported():
        if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                if name not in os.environ:
                    raise UserError(
                        f"environment {name}", None, "is not set beside WORLD_SIZE", "torchrun's environment"
                    )
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
