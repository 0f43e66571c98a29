"""Triton kernels launched again with the arguments of an earlier call, at a fraction of what Triton's own launch costs.

Triton looks at every argument of every launch to find the variant that it compiled for such arguments. Where shapes,
dtypes and alignments are those of an earlier call, that is known.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(eq=False)
class KernelCall:
    """A kernel and all its arguments but the tensors, which come first in its signature.

    Whoever keeps one calls it only with tensors of the same `variant`.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]
    _compiled: Any = None

    def __post_init__(self) -> None:
        self.arguments = {name: self.arguments[name] for name in self.kernel.arg_names if name in self.arguments}

    def __call__(self, *tensors: torch.Tensor) -> None:
        grid = (self.programs, 1, 1)
        if self._compiled is not None:
            self._compiled[grid](*tensors, *self.arguments.values())
        else:  # the interpreter compiles nothing
            self._compiled = self.kernel[grid](*tensors, **self.arguments, **self.options)


def variant(*tensors: torch.Tensor) -> tuple:
    """What a kernel is compiled for of its tensors: their device, dtypes, and which begin at a multiple of 16 bytes."""
    return tensors[0].device, *((tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors)
