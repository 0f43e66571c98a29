"""Triton kernels launched again with the arguments of an earlier call, past Triton's own search for the variant.

Triton looks at every argument of every launch to find the variant that it compiled for such arguments. Where shapes,
dtypes and alignments are those of an earlier call, that is known: in a model of 64 equal layers all but the first.

A kernel with the constant OVERLAPS begins while the one before it on its stream ends, on GPUs that can do that (Hopper
and later; CUDA: programmatic dependent launch): it calls `await_inputs` before it reads what a kernel has written.

What differs from pass to pass (numbers of tokens, of prompts, of tokens in a chunk) is what kernels that do not gain
by it are not specialized for: a variant is compiled when it is first met, which takes seconds.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

MOST_CALLS = 4096  # that are remembered


@dataclass(eq=False)
class KernelCall:
    """A kernel and all its arguments but the tensors, which come first in its signature.

    Whoever keeps one calls it only with tensors of the same `variant`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    _compiled: Any = None

    def __post_init__(self) -> None:
        self.arguments = {name: self.arguments[name] for name in self.kernel.arg_names if name in self.arguments}
        self.grid = (*self.grid, 1, 1)[:3]

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        if self._compiled is not None:
            self._compiled[self.grid](*tensors, *self.arguments.values())
        else:  # the interpreter compiles nothing
            self._compiled = self.kernel[self.grid](*tensors, **self.arguments, **self.options)


def variant(*tensors: torch.Tensor | None) -> tuple:
    """What a kernel is compiled for of its tensors: their device, dtypes, and which begin at a multiple of 16 bytes."""
    return tensors[0].device, *[(t.dtype, t.data_ptr() % 16 == 0) if t is not None else None for t in tensors]


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether kernels on `device` can begin while the one before them ends."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_calls: dict[tuple, KernelCall] = {}  # as Triton keeps what it compiled: by kernel, for the process


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[torch.Tensor | None, ...], numbers: tuple, **named: Any
) -> None:
    """kernel[grid](*tensors, *numbers, **named), remembered.

    Args:
        numbers: the arguments behind the tensors in the kernel's signature.
        named: its constants, and options of the launch (num_warps, maxnreg, ..).
    """
    key = (kernel, grid, variant(*tensors), numbers, tuple(named.items()))
    call = _calls.get(key)
    if call is None:
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        names = kernel.arg_names
        if "OVERLAPS" in names:
            overlaps = can_overlap(tensors[0].device)
            named |= {"OVERLAPS": overlaps, "launch_pdl": overlaps}
        arguments = dict(zip(names[len(tensors) :], numbers, strict=False))
        arguments |= {name: value for name, value in named.items() if name in names}
        options = {name: value for name, value in named.items() if name not in names}
        call = _calls[key] = KernelCall(kernel, grid, arguments, options)
    call(*tensors)
