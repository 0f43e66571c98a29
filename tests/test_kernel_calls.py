"""Launches that are remembered: what was compiled for some arguments is launched with their like, and no others."""

import pytest
import torch

from megatron_ssm_tp.ops import kernel_calls
from megatron_ssm_tp.ops.kernel_calls import launch


class Kernel:
    """As Triton's: kernel[grid](..) compiles and launches, and what it returns launches by [grid](..) alone."""

    arg_names = ("x_ptr", "bias_ptr", "rows", "eps", "WIDTH")

    def __init__(self) -> None:
        self.compiled: list[dict] = []
        self.again: list[tuple] = []

    def __getitem__(self, grid):
        def compile_and_launch(*tensors, **named):
            self.compiled.append({"grid": grid, "tensors": tensors, **named})
            return Compiled(self)

        return compile_and_launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.again.append((grid, *arguments))


X = torch.zeros(40)
GIVEN = {"grid": (3,), "tensors": (X, None), "numbers": (5, 0.5), "WIDTH": 8, "num_warps": 4}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(kernel_calls, "_calls", {})


def launched(kernel: Kernel, **changed) -> None:
    given = GIVEN | changed
    launch(kernel, given.pop("grid"), given.pop("tensors"), given.pop("numbers"), **given)


def test_the_like_is_launched_without_being_compiled():
    """With all arguments in the signature's order, the new tensors among them."""
    kernel, other = Kernel(), torch.ones(40)
    launched(kernel)
    launched(kernel, tensors=(other, None))
    expected = {"grid": (3, 1, 1), "tensors": (X, None), "rows": 5, "eps": 0.5, "WIDTH": 8, "num_warps": 4}
    assert kernel.compiled == [expected]
    [(grid, x, *rest)] = kernel.again
    assert grid == (3, 1, 1) and x is other and rest == [None, 5, 0.5, 8]


@pytest.mark.parametrize(
    "changed",
    [
        {"tensors": (X.double(), None)},
        {"tensors": (X[1:], None)},
        {"tensors": (X, X)},
        {"numbers": (6, 0.5)},
        {"numbers": (5, 0.25)},
        {"WIDTH": 16},
        {"num_warps": 8},
        {"grid": (3, 2)},
    ],
    ids=["dtype", "alignment", "a tensor where none was", "number", "float", "constant", "option", "grid"],
)
def test_what_differs_is_compiled(changed):
    kernel = Kernel()
    launched(kernel)
    launched(kernel, **changed)
    launched(kernel)
    assert len(kernel.compiled) == 2 and len(kernel.again) == 1


def test_kernels_are_not_mistaken_for_each_other():
    one, other = Kernel(), Kernel()
    launched(one)
    launched(other)
    assert len(one.compiled) == len(other.compiled) == 1


def test_no_more_is_remembered_than_has_room(monkeypatch):
    monkeypatch.setattr(kernel_calls, "MOST_CALLS", 3)
    kernel = Kernel()
    for rows in range(10):
        launched(kernel, numbers=(rows, 0.5))
        assert len(kernel_calls._calls) <= 3
