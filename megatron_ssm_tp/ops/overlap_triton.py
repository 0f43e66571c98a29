"""Kernels that begin while the one before them on their stream ends (CUDA: programmatic dependent launch)."""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def await_inputs(OVERLAPS: tl.constexpr):
    """Wait for all that earlier kernels write, and let the next kernel begin.

    In this order: the next kernel then begins behind the writes of all but this one. Before it are read parameters, and
    what this kernel's caller promises that the kernel before does not write.
    """
    if OVERLAPS:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def ask_ahead(at, BYTES: tl.constexpr):
    """Ask for the BYTES, a multiple of 16, that begin at each of the addresses `at`, such multiples too, to be brought
    into the L2 cache (Hopper and later)."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [at, tl.full(at.shape, BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
