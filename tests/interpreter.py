"""Triton's interpreter, in a process that was started with TRITON_INTERPRET=1."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch


@cache
def patch_interpreter() -> None:
    """Make the interpreter run with today's numpy, and round as GPUs do."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    import triton.runtime.interpreter as interpreter

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of NaN
    patch_tensor, cast = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl
    dot = interpreter.InterpreterBuilder.create_dot

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        # numpy 2.4 no longer makes an int of an array of one element
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounded(self, src, dst_type):
        # The interpreter cuts float32 off where GPUs round to bfloat16.
        if src.dtype.scalar != interpreter.tl.float32 or dst_type.scalar != interpreter.tl.bfloat16:
            return cast(self, src, dst_type)
        bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, dst_type.scalar)

    def widened(self, a, b, *arguments):
        # It multiplies the bits of bfloat16s as integers.
        a, b = (
            cast(self, t, interpreter.tl.float32) if t.dtype.scalar == interpreter.tl.bfloat16 else t for t in (a, b)
        )
        return dot(self, a, b, *arguments)

    interpreter.InterpreterBuilder.create_dot = widened
    interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl = patched, rounded


@contextmanager
def programs_backwards() -> Iterator[None]:
    """Within it a kernel's programs run from the last to the first: GPUs promise no order."""
    import triton.runtime.interpreter as interpreter

    builder = interpreter.InterpreterBuilder
    forwards = builder.set_grid_idx
    builder.set_grid_idx = lambda self, *at: forwards(
        self, *(size - 1 - i for size, i in zip(self.grid_dim, at, strict=True))
    )
    try:
        yield
    finally:
        builder.set_grid_idx = forwards
