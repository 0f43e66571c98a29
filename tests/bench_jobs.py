"""What ranks and Triton's interpreter are asked about the tools that time and soak all-reduces."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import bench_allreduce as bench
import bench_ways
import soak_allreduce
import tune_allreduce
from soak_calls import Choices

from megatron_ssm_tp.comm import backends
from megatron_ssm_tp.errors import UserError

CPU = torch.device("cpu")


def _flip_a_bit(x: torch.Tensor, out: torch.Tensor) -> None:
    if dist.get_rank() == 1:
        out.view(-1).view(torch.uint8)[0] ^= 1


def _all_wrong(x: torch.Tensor, out: torch.Tensor) -> None:
    out[-1, -1] = out[-1, -1] * 3 + 1


def _lose_the_infinite(x: torch.Tensor, out: torch.Tensor) -> None:
    out.nan_to_num_(0.0, 0.0, 0.0)


def _write_to_the_input(x: torch.Tensor, out: torch.Tensor) -> None:
    x[0, 0] += 1


FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "a bit on one rank": _flip_a_bit,
    "the same wrong value on all": _all_wrong,
    "no NaN and Inf": _lose_the_infinite,
    "the input overwritten": _write_to_the_input,
}


@contextlib.contextmanager
def faulty(fault: str, first: int) -> Iterator[None]:
    """The backend "collective", with a fault from its call number `first` on."""
    sound, calls = backends.BACKENDS["collective"], 0

    def all_reduce(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        nonlocal calls
        out, calls = sound.all_reduce(x, *args, **kwargs), calls + 1
        if calls > first:
            FAULTS[fault](x, out)
        return out

    backends.BACKENDS["collective"] = sound._replace(all_reduce=all_reduce)
    try:
        yield
    finally:
        backends.BACKENDS["collective"] = sound


def soaked(fault: str = "", calls: int = 300, seed: int = 0) -> tuple[bool, list[str], str]:
    """Of a soak of the backend "collective": passed, the failures, and the text; all as this rank has them."""
    groups = soak_allreduce.make_groups()
    with faulty(fault, 50) if fault else contextlib.nullcontext():
        choices = Choices(len(groups), ("collective",))
        report = soak_allreduce.Soak(choices, groups, CPU, seed, 5000).run(60.0, calls)
    return report.passed, report.failures, report.in_words()


def faulty_soak(arguments: list[str]) -> None:
    """The whole tool, with a fault."""
    with faulty("a bit on one rank", 50):
        soak_allreduce.run(soak_allreduce.read_args(arguments))


def measured(failing_rank: int | None) -> list[bench.Cell]:
    """The cells of a way that fails on one rank, where it does not communicate, or on none."""

    def run() -> bench_ways.Result:
        if dist.get_rank() == failing_rank:
            raise ValueError("a way's own\nerror")
        return (torch.ones(2, 3),)

    way, cell = bench_ways.Way("a way", run), bench.Cell("sum", 3, 2, "a way", False)
    return bench.measure(way, (torch.ones(2, 3),), cell, CPU, graphs=False)


def error_of(tool: str, arguments: list[str]) -> str:
    """What a tool raises that cannot do what it is asked."""
    module = {"tune_allreduce": tune_allreduce, "soak_allreduce": soak_allreduce}[tool]
    try:
        module.run(module.read_args(arguments))
    except UserError as error:
        return str(error)
    return ""
