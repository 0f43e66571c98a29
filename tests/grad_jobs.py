"""What Triton's interpreter is asked about gradients: where they differ from the references' in float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module

import torch
from hopper import compiled
from interpreter import patch_interpreter, programs_backwards

from megatron_ssm_tp.ops import reference

Tensors = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    """Dense sequences. `how` are GradLaunch's fields; `gap` is how much wider than it need be the projection is."""

    batch: int = 2
    length: int = 5
    channels: int = 7
    d_state: int = 16
    heads: int | None = None
    dtype: torch.dtype = torch.float32
    time_first: bool = True  # the projection is [l, b, ..], as in a model
    gap: int = 0
    initial: bool = False
    outputs: tuple[str, ...] = ("y", "final")  # those that a loss depends on
    steady: bool = False  # little is forgotten
    backwards: bool = False  # the order of a kernel's programs
    seed: int = 0
    device: str = "cpu"
    how: dict = field(default_factory=dict)


def _normal(case: Case) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(case.device)


def _rows(case: Case, normal: Callable, *shape: int) -> torch.Tensor:
    """[b, l, ..], views of wider rows."""
    order = (case.length, case.batch) if case.time_first else (case.batch, case.length)
    wide = normal(*order, *shape[:-1], shape[-1] + case.gap).to(case.dtype)[..., case.gap :]
    return wide.transpose(0, 1) if case.time_first else wide


def scan_inputs(case: Case) -> Tensors:
    normal, D, N = _normal(case), case.channels, case.d_state
    x, z = _rows(case, normal, 2 * D).chunk(2, dim=-1)
    B, C = _rows(case, normal, *([case.heads] if case.heads else []), 2 * N).chunk(2, dim=-1)
    rate = torch.exp(normal(D, N)) * torch.arange(1, N + 1, device=case.device) * (1e-3 if case.steady else 1)
    found = {"x": x, "dt": _rows(case, normal, D), "A": -rate, "B": B, "C": C, "D": normal(D), "z": z}
    bias = (normal(D) - 1).to(case.dtype)
    return found | {"dt_bias": bias, "initial": normal(case.batch, D, N) if case.initial else None}


def conv_inputs(case: Case, width: int, bias: bool) -> Tensors:
    normal, D = _normal(case), case.channels
    found = {"x": _rows(case, normal, D), "weight": normal(D, width).to(case.dtype)}
    found["bias"] = normal(D).to(case.dtype) if bias else None
    return found | {"initial": normal(case.batch, D, width).to(case.dtype) if case.initial else None}


@contextmanager
def in_float64() -> Iterator[None]:
    """Within it the references, which compute in what Tensor.float() gives, compute in float64."""
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        del torch.Tensor.float


def outputs_and_gradients(operator: Callable, given: Tensors, slopes: Tensors) -> Tensors:
    """y, final, and each argument's gradient, where those of y and final are `slopes`; a name left out is not used."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in given.items()}
    found = dict(zip(("y", "final"), operator(*leaves.values()), strict=True))
    torch.autograd.backward([found[name] for name in slopes], list(slopes.values()))
    return {n: t.detach() for n, t in found.items()} | {f"d{n}": t.grad for n, t in leaves.items() if t is not None}


def truth(operator: Callable, given: Tensors, slopes: Tensors) -> Tensors:
    """`outputs_and_gradients` in float64."""
    wide = ({name: None if t is None else t.double() for name, t in tensors.items()} for tensors in (given, slopes))
    with in_float64():
        return outputs_and_gradients(operator, *wide)


def slopes_for(given: Tensors, outputs: tuple[str, ...], final_width: int) -> Tensors:
    generator, x = torch.Generator(given["x"].device).manual_seed(1), given["x"]
    shapes = {"y": (x.shape, x.dtype), "final": ((x.shape[0], x.shape[2], final_width), torch.float32)}
    return {
        name: torch.randn(shapes[name][0], generator=generator, device=x.device).to(shapes[name][1]) for name in outputs
    }


def _differ(name: str, found: torch.Tensor | None, expected: torch.Tensor | None, like: torch.dtype) -> str:
    """Where they differ by more than 1e-4 of the root mean square and two units of the found one's last place."""
    if found is None or expected is None:
        found = expected if found is None else found
        return "" if found is None or not found.any() else f"{name}: one of the two is None; "
    if found.dtype != like or found.shape != expected.shape:
        return f"{name}: {found.dtype} {tuple(found.shape)}; "
    unit = 2 * torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 0.0
    wrong = ~((found.double() - expected).abs() <= 1e-4 * expected.square().mean().sqrt() + unit * expected.abs())
    at = wrong.nonzero()
    return "" if not len(at) else f"{name} {at[:3].tolist()}: {found[wrong][:3]} for {expected[wrong][:3]}; "


def _compare(case: Case, kernel: Callable, operator: Callable, given: Tensors, final_width: int) -> str:
    slopes = slopes_for(given, case.outputs, final_width)
    with programs_backwards() if case.backwards else nullcontext():
        found = outputs_and_gradients(kernel, given, slopes)
    expected = truth(operator, given, slopes)
    dtypes = {"y": given["x"].dtype, "final": torch.float32} | {
        f"d{n}": t.dtype for n, t in given.items() if t is not None
    }
    return "".join(_differ(name, found[name], expected[name], dtype) for name, dtype in dtypes.items())


def _kernels() -> None:
    patch_interpreter()
    # Fills torch.empty with NaN: whoever reads memory that nobody wrote is seen.
    torch.use_deterministic_algorithms(True)


def compare_scan(case: Case) -> str:
    _kernels()
    from megatron_ssm_tp.ops import selective_scan_grad as kernels

    how = kernels.GradLaunch(**case.how)
    given = scan_inputs(case)
    return _compare(case, lambda *a: kernels.selective_scan(*a, how), reference.selective_scan, given, case.d_state)


def compare_conv(case: Case, width: int, bias: bool) -> str:
    _kernels()
    from megatron_ssm_tp.ops import conv1d_grad as kernels

    given = conv_inputs(case, width, bias)
    how = kernels.ConvLaunch(**case.how)
    return _compare(case, lambda *a: kernels.causal_conv1d(*a, how), reference.causal_conv1d, given, width)


def compare_when_run_again(case: Case) -> str:
    """Two runs in other orders of programs, bit by bit, with and without gradients for all but A."""
    _kernels()
    from megatron_ssm_tp.ops.selective_scan_grad import GradLaunch, selective_scan

    given, how = scan_inputs(case), GradLaunch(**case.how)
    slopes = slopes_for(given, case.outputs, case.d_state)
    first = outputs_and_gradients(lambda *a: selective_scan(*a, how), given, slopes)
    leaf = given["A"].clone().requires_grad_()
    with programs_backwards():
        y, _ = selective_scan(*(given | {"A": leaf}).values(), how)
        y.backward(slopes["y"])
    if any(t is not None and t.grad is not None for t in given.values()):
        return "a gradient that nobody asked for"
    return "" if torch.equal(first["y"], y) and torch.equal(first["dA"], leaf.grad) else "not the same bits"


def compile_for_hopper(module: str, kernel: str, constants: dict) -> str:
    """PTX of a kernel of ops as it would be launched on bfloat16 tensors and float32 weights."""
    function = getattr(import_module(f"megatron_ssm_tp.ops.{module}"), kernel)
    rows = ("x_ptr", "dt_ptr", "z_ptr", "dy_ptr", "out_ptr", "dx_ptr", "ddt_ptr", "dz_ptr", "weight_ptr", "dt_bias_ptr")
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in function.arg_names}
    types |= {name: "*bf16" for name in types if name in rows}
    return compiled(function, types, constants, {"num_warps": 1}).asm["ptx"]
