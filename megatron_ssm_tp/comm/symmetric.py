"""The backend "symmetric": all-reduces by kernels of ours over memory that the GPUs of one node share.

Each rank of a group has a buffer that its peers write into (torch's symmetric memory; NVLink multicast is not used).
It is allocated once, by the group's first reduction or by `prepare`. Nothing waits on the host, so that calls can be
captured in CUDA graphs, and graphs and eager calls of any sizes can follow each other. A GPU's calls, of all its
groups, belong on one stream, or on streams ordered alike on all ranks: as with NCCL's communicators, two groups'
kernels that start in different orders on different ranks can wait for each other. A peer that does not answer within
the group's timeout ends the process with a CUDA error.
"""

import socket
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..errors import UserError
from ..ops.launching import power_of_two
from .recipes import AllReduceRecipe
from .tuning import Launch
from .workspace import FLAGS, Workspace

TIMEOUT_S = 600.0
POLLS_A_SECOND = 1_000_000  # about
MOST_UNEVEN_VALUES = 4_000_000  # of a quantized tensor that is fused where it would not be if it were large: see fits()

_workspaces: WeakKeyDictionary[dist.ProcessGroup, Workspace | str] = WeakKeyDictionary()  # a str: why there is none


def prepare(group: dist.ProcessGroup, timeout_s: float = TIMEOUT_S) -> None:
    """Allocate a group's buffers now, on the current GPU: a collective call. Once for a group.

    Args:
        group: this rank's process group.
        timeout_s: how long a rank waits for another in a reduction, about; then it ends.

    Raises:
        UserError: the ranks do not share a node, or have no Triton or no peer access; or it was prepared before.
    """
    found = _workspaces.get(group)
    if isinstance(found, Workspace):
        raise UserError("group", group.group_name, "has its buffers already", "a group not reduced over before")
    if found is None:
        found = _workspaces[group] = _allocate(group, timeout_s)
    if isinstance(found, str):
        raise UserError("group", group.group_name, found, "a group of GPUs of one node with peer access")


def supports(x: torch.Tensor, group: dist.ProcessGroup, recipe: AllReduceRecipe) -> tuple[bool, str]:
    """(ok, reason). A group's first call allocates its buffers, collectively.

    The same on every rank whose x is on its current GPU, and if either all or none of them capture a CUDA graph.
    """
    ok, reason = recipe.supports(x.dtype, group)
    if not ok:
        return False, reason
    if not x.is_cuda:
        return False, f"x is on {x.device.type}, not on a GPU"
    if group.size() == 1:
        return True, ""  # nothing is sent
    if x.device.index != torch.cuda.current_device():
        return False, f"x is on {x.device}, not on the current GPU"
    found = _workspaces.get(group)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return False, "the group has no buffers yet and none can be allocated under capture: reduce once before"
        found = _workspaces[group] = _allocate(group, TIMEOUT_S)
    return (False, found) if isinstance(found, str) else (True, "")


def all_reduce(
    x: torch.Tensor,
    group: dist.ProcessGroup,
    recipe: AllReduceRecipe,
    *,
    exact_columns: int = 0,
    launch: Launch | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As collectives.all_reduce, of what `supports` supports.

    Args:
        launch: the table's if none is given.
        out: takes the sum and says its shape and dtype; x is then float32 parts [P, *out.shape] of what this rank adds,
            and there are no exact columns.
    """
    recipe.check(x, group, exact_columns)
    if out is None and (group.size() == 1 or x.numel() == 0):
        return x.clone(memory_format=torch.contiguous_format)
    return _kernels().reduce(workspace_of(group), x, recipe, exact_columns, launch, out)


def all_reduce_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: dist.ProcessGroup,
    recipe: AllReduceRecipe,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fused.all_reduce_add_norm in one kernel, of what `supports` and `fits` allow."""
    return _kernels().reduce_add_norm(workspace_of(group), x, residual, weight, eps, recipe, launch)


def fits(x: torch.Tensor, residual: torch.dtype, recipe: AllReduceRecipe) -> bool:
    """Whether all_reduce_add_norm can take x and a residual stream of that dtype, and is worth it.

    It can where rows are whole blocks, few enough for one program to hold. In large tensors a second kernel for
    addition and norm costs less than quantizing what is not there, where a program takes a row in a tile (the next
    power of two) that is much longer; than what a residual wider than x does to the registers; and than decoding whole
    rows of int4. On 2 x H100, us fused, and apart: int8, rows of 2560, 8192 tokens 200, and 97 for the sum alone; of
    4096, 8192 tokens 218 and 231, with a float32 residual 378 and 276; int4 300 and 226. Bf16 quantizes nothing:
    209 and 289, with a float32 residual 262 and 335.
    """
    length = x.shape[-1]
    if length % recipe.block_size or not 0 < length <= 16384:
        return False
    tile = power_of_two(length)
    lean = tile <= 1.25 * length and residual == x.dtype and recipe.name != "int4"
    return recipe.name == "bf16" or lean or x.numel() <= MOST_UNEVEN_VALUES


def workspace_of(group: dist.ProcessGroup) -> Workspace:
    found = _workspaces.get(group)
    if not isinstance(found, Workspace):
        raise UserError("group", group.group_name, found or "has no buffers yet", "a group that supports() allows")
    return found


def _kernels() -> ModuleType:
    from . import symmetric_launch

    return symmetric_launch


def _allocate(group: dist.ProcessGroup, timeout_s: float) -> Workspace | str:
    """A workspace, or why there can be none: the same on every rank.

    What may fail on one rank alone is tried before the next collective, and its outcome exchanged.
    """
    memory, missing = None, ""
    try:
        missing = _what_is_missing()
        memory = None if missing else _zeros(group.size())
    except Exception as error:  # whatever it is, the others must hear of it
        missing = f"a rank cannot have the buffers: {_first_line(error)}"
    found: list[tuple[str, str]] = [("", "")] * group.size()
    dist.all_gather_object(found, (socket.gethostname(), missing), group=group)
    reason = next((reason for _, reason in found if reason), "")
    if not reason and len({host for host, _ in found}) > 1:
        reason = "its ranks are on several nodes"
    if reason:
        return reason
    workspace = None
    try:
        workspace = _rendezvous(group, memory, timeout_s)
    except Exception as error:
        reason = f"its GPUs cannot share memory: {_first_line(error)}"
    reasons = [""] * group.size()
    dist.all_gather_object(reasons, reason, group=group)  # and nobody sends before everybody's flags are zero
    return next((reason for reason in reasons if reason), None) or workspace


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _what_is_missing() -> str:
    try:
        _kernels()
    except ModuleNotFoundError as error:
        return f"a rank has no {error.name}"
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        return "a rank's GPU is older than NVIDIA's Ampere or of another make"
    return ""


def _zeros(ranks: int) -> torch.Tensor:
    """This rank's buffer and flags."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    size = 2 * Workspace.bytes_of_half(ranks) + 2 * FLAGS * 4
    memory = symmetric_memory.empty(size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
    memory.zero_()
    torch.cuda.synchronize()
    return memory


def _rendezvous(group: dist.ProcessGroup, memory: torch.Tensor, timeout_s: float) -> Workspace:
    """Exchange the addresses of all ranks' memory: collective."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    handle = symmetric_memory.rendezvous(memory, group)
    buffers, half_bytes = tuple(handle.buffer_ptrs), Workspace.bytes_of_half(group.size())
    counters = torch.zeros(2, dtype=torch.int32, device=memory.device)
    torch.cuda.synchronize()
    patience = min(int(timeout_s * POLLS_A_SECOND), 2**31 - 1)
    flags = tuple(buffer + 2 * half_bytes for buffer in buffers)
    return Workspace(group.rank(), group.size(), buffers, flags, counters, patience, (memory, handle))
