"""What Triton's interpreter is asked about the tools that check and time operators."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from interpreter import patch_interpreter

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import bench_ops
import check_ops
import measure
from check_ops import FLOAT, HALF, Work
from op_cases import Case
from op_floor import Floor

CPU = torch.device("cpu")
WORKS = [
    Work(Case("scan", (9, 3), 6, 8, HALF)),
    Work(Case("conv", (5, 1), 6, 4, FLOAT, initial=True)),
    Work(Case("conv", (7,), 6, 4, FLOAT, initial=True), ((1,), (2, 5))),
    Work(Case("scan", (7,), 6, 8, FLOAT, initial=True), ((3,),)),
    Work(Case("scan step", (1, 1), 6, 8, HALF, initial=True)),
    Work(Case("conv step", (1, 1), 6, 3, FLOAT, initial=True)),
]


def _a_value(y: torch.Tensor, arguments: tuple) -> torch.Tensor:
    y[-1, 0] += 0.5
    return y


def _states(y: torch.Tensor, arguments: tuple) -> torch.Tensor:
    states, slots = next((a, b) for a, b in itertools.pairwise(arguments) if b.dtype == torch.int64)
    states[slots[0]] *= 1.01
    return y


def _another_slot(y: torch.Tensor, arguments: tuple) -> torch.Tensor:
    next(a for a, b in itertools.pairwise(arguments) if b.dtype == torch.int64)[0] += 1
    return y


def _inputs(y: torch.Tensor, arguments: tuple) -> torch.Tensor:
    arguments[0][0] += 1
    return y


def _raises(y: torch.Tensor, arguments: tuple) -> torch.Tensor:
    raise RuntimeError("a kernel's\nown error")


FAULTS: dict[str, Callable] = {
    "y is off": _a_value,
    "states are off": _states,
    "a slot of no request": _another_slot,
    "inputs were written": _inputs,
    "a kernel's own error": _raises,
}


def checked(fault: str = "") -> list[str]:
    """Cases of check_ops that are found wrong, of operators that are sound, or have a fault."""
    patch_interpreter()
    sound = check_ops.ours

    def faulty(case: Case) -> Callable[..., torch.Tensor]:
        return lambda *arguments: FAULTS[fault](sound(case)(*arguments), arguments)

    with torch.no_grad(), mock.patch.object(check_ops, "ours", faulty if fault else sound):
        return check_ops.check_all(iter(WORKS), CPU)


def benched() -> tuple[list[dict], str]:
    """Rows of bench_ops and its table, of small cases."""
    patch_interpreter()
    arguments = ["--channels", "6", "--shapes", "2x5", "--batches", "3", "--d-state", "8"]
    floor = Floor(1e12, 1e12, "")
    few = {"_REPEATS": 1, "_FEWEST": 1}
    with torch.no_grad(), mock.patch.multiple(measure, **few), mock.patch.object(bench_ops, "_STEP_CALLS", 1):
        rows = [bench_ops.measure(case, floor, CPU) for case in bench_ops.read_cases(bench_ops.read_args(arguments))]
    listed = [row._asdict() | {"case": asdict(row.case)} for row in rows]
    return listed, bench_ops.table(rows) + bench_ops.notes(rows)
