"""What the tools that time and check share: ranks, conditions, timing, bits; and how every tool prints."""

import gc
import os
import subprocess
import traceback
from collections.abc import Callable
from datetime import date, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ssm_tp.comm import symmetric
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.ranks import lost_peers_reported

# No way that is measured uses NVLink multicast, NCCL's neither.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
_REPORTED = (*NO_MULTICAST, "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_ALGO", "NCCL_PROTO")
_REPEATS, _FEWEST, _SECONDS = 50, 10, 0.1
PASS_SECONDS, _FEWEST_PASSES = 3.0, 5


def start(timeout_s: float) -> torch.device:
    """Meet the other ranks (torchrun's environment, or a group that is there already): this rank's device.

    Raises:
        UserError: there is one rank, or more of them than GPUs.
        PeerLostError: the others could not be met.
    """
    os.environ.update(NO_MULTICAST)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if rank >= gpus:
            raise UserError("number of ranks", rank + 1, "are more than this machine's GPUs", f"2 to {gpus}")
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        raise UserError("number of ranks", 1, "nothing is reduced", "2 or more (torchrun --nproc-per-node)")
    if not dist.is_initialized():
        backend, on_gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        with lost_peers_reported():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=on_gpu)
    gc.freeze()  # every capture of a CUDA graph collects garbage: not through all that was imported
    return device


def prepare_symmetric(groups: list[dist.ProcessGroup], device: torch.device, timeout_s: float) -> str:
    """Allocate the backend "symmetric"'s buffers for the groups that this rank belongs to.

    Returns:
        Why it cannot be used, the same on every rank; empty if it can.
    """
    if device.type != "cuda":
        return "needs GPUs"
    reason = ""
    try:
        for group in groups:
            symmetric.prepare(group, timeout_s=timeout_s)
    except UserError as error:
        reason = str(error)
    reasons = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), "")


# --- Conditions -----------------------------------------------------------------------------------------------------


def conditions(device: torch.device) -> dict[str, str]:
    """What figures depend on, to be printed with them."""
    found = {"date": str(date.today())}
    if dist.is_initialized():
        found |= {"ranks": str(dist.get_world_size()), "backend": dist.get_backend()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            found |= {"link": _link(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        found["driver"] = _driver()
    else:
        found["device"] = f"CPU ({os.cpu_count()} cores)"
    found |= {"torch": torch.__version__, "triton": version_of("triton")}
    return found | {name: os.environ[name] for name in _REPORTED if name in os.environ}


def in_words(found: dict[str, str]) -> str:
    return ", ".join(value if name == "date" else f"{name} {value}" for name, value in found.items())


def version_of(package: str) -> str:
    """The installed package's version, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    lines = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    return lines[0] if lines else "unknown"


def _link() -> str:
    """How nvidia-smi says that this run's GPUs are linked, such as NV18 or PIX."""
    ranks = dist.get_world_size()
    rows = [line.split() for line in _nvidia_smi("topo", "-m")]
    cells = [row[1 : 1 + ranks] for row in rows if row and row[0].startswith("GPU") and "X" in row[1:]]
    kinds = {cell for row in cells[:ranks] for cell in row} - {"X"}
    return "/".join(sorted(kinds)) or "unknown"


def _nvidia_smi(*arguments: str) -> list[str]:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


# --- Timing ---------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], device: torch.device, refresh: Callable[[], object] | None = None) -> float:
    """How long `run` takes: the median of 50 (of fewer, if they are long), of the rank where that is largest.

    Runs are queued, not waited for one by one: what the host does for the next passes while the device is busy, and
    shows where the device has to wait for it.

    Args:
        refresh: called before each run, not timed: restores what `run` overwrites.
    """
    for _ in range(2):
        _timed(run, device, refresh, 1)
    meet()
    estimate = largest(median(_timed(run, device, refresh, 3)), device)  # alike, so that ranks repeat alike
    repeats = min(_REPEATS, max(_FEWEST, int(_SECONDS / max(estimate, 1e-9))))
    return largest(median(_timed(run, device, refresh, repeats)), device)


def _timed(
    run: Callable[[], object], device: torch.device, refresh: Callable[[], object] | None, repeats: int
) -> list[float]:
    marks = []
    for _ in range(repeats):
        if refresh is not None:
            refresh()
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
        else:
            begin = perf_counter()
            run()
            end = perf_counter()
        marks.append((begin, end))
    if device.type != "cuda":
        return [end - begin for begin, end in marks]
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in marks]


class Passed(NamedTuple):
    """Seconds of a pass, each a median: until its result is there, and until the host has asked for all of it."""

    whole: float
    host: float


def pass_seconds(
    run: Callable[[], object],
    device: torch.device,
    refresh: Callable[[], object] | None = None,
    fit: float | None = None,
) -> Passed:
    """How long a pass takes that begins on an idle device and is waited for, as a step of an engine is.

    Medians of as many as `fit` into so many seconds (3), 5 to 50 of them, after two that are not counted; of the rank
    where they are largest. `refresh` as in `seconds`.
    """
    waited_for(run, device, refresh)
    estimate = largest(waited_for(run, device, refresh).whole, device)  # alike, so that ranks repeat alike
    repeats = min(_REPEATS, max(_FEWEST_PASSES, int((fit or PASS_SECONDS) / max(estimate, 1e-9))))
    found = [waited_for(run, device, refresh) for _ in range(repeats)]
    return Passed(*(largest(median(column), device) for column in zip(*found, strict=True)))


def waited_for(run: Callable[[], object], device: torch.device, refresh: Callable[[], object] | None) -> Passed:
    """One pass of `pass_seconds`, by this rank's own clock."""
    if refresh is not None:
        refresh()
    meet()
    _synchronize(device)
    begin = perf_counter()
    run()
    launched = perf_counter()
    _synchronize(device)
    return Passed(perf_counter() - begin, launched - begin)


def meet() -> None:
    """Wait for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured[T](run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `run`, which has run before, and what it returned: tensors that each replay fills anew."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's own threads may call CUDA meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph, result


def busy_clock(run: Callable[[], object]) -> float | None:
    """The SM clock in Hz while `run` keeps the current GPU busy; None if nvidia-smi does not say."""
    uuid = f"GPU-{str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix('GPU-')}"
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    began = perf_counter()
    while perf_counter() < began + 0.5:  # clocks take a moment to rise
        run()
    try:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    while asked.poll() is None and perf_counter() < began + 20:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    if asked.poll() is None:
        asked.kill()
    found = asked.communicate()[0].strip()
    return float(found) * 1e6 if found.isdigit() else None


# --- Agreement ------------------------------------------------------------------------------------------------------


def largest(value: float, device: torch.device) -> float:
    """The largest of the ranks' values; without ranks the value."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def tried[T](step: Callable[[], T], device: torch.device) -> tuple[T | None, str]:
    """What `step` returns, or None and why, if it failed on any rank: then on all."""
    result, note = None, ""
    try:
        result = step()
    except Exception as error:  # whatever a way may raise: the others are measured all the same
        frame = traceback.extract_tb(error.__traceback__)[-1]
        note = (
            " ".join(f"{type(error).__name__}: {error}".split())[:200]
            + f" ({Path(frame.filename).name}:{frame.lineno})"
        )
    if largest(float(bool(note)), device):
        return None, note or "failed on another rank"
    return result, ""


def same_bits(x: torch.Tensor) -> bool:
    """Whether all ranks hold the same bits; the answer is the same on all."""
    mine = x.contiguous().view(-1).view(torch.uint8)
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    return largest(float(not torch.equal(mine, theirs)), x.device) == 0


# --- Output ---------------------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
