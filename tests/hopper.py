"""Kernels compiled for GPUs that are not here, with the compiler that Triton brings along."""

from collections.abc import Mapping
from typing import Any


def compiled(
    kernel: Any,
    types: Mapping[str, Any],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    multiples: tuple[str, ...] = (),
    arch: int = 90,
) -> Any:
    """A Triton kernel for sm_`arch`. `types` of its other arguments, such as "*bf16" or "i32"; None: None is passed.
    Arguments whose names end with one of `multiples` are taken to be multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    known = {name: None for name, kind in types.items() if kind is None} | dict(constants)
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in known else types[name] for name in names},
        {(names.index(name),): value for name, value in known.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in known and name.endswith(multiples)
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))


def compile_for_hopper(
    kernel: Any, types: Mapping[str, str | None], constants: Mapping[str, Any], warps: int, aligned_strides: bool = True
) -> Any:
    """For sm_90; pointers and, if `aligned_strides`, strides are taken to be multiples of 16."""
    multiples = ("_ptr", "_stride") if aligned_strides else ("_ptr",)
    return compiled(kernel, types, constants, {"num_warps": warps}, multiples)


def reads_before_waiting(ptx: str) -> bool:
    """Whether memory is read before what the kernel before writes is waited for."""
    before, _ = ptx.split("griddepcontrol.wait")
    return "ld.global" in before
