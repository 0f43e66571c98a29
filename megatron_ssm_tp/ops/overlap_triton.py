"""Kernels that begin while the one before them on their stream ends (CUDA: programmatic dependent launch)."""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def await_inputs(OVERLAPS: tl.constexpr):
    """Wait for all that earlier kernels write, and let the next kernel begin. Before it parameters alone are read.

    In this order: the next kernel then begins behind the writes of all but this one.
    """
    if OVERLAPS:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
