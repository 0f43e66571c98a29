"""What Triton's interpreter is asked about Mamba-2's kernels: where they differ from the reference."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from hopper import compiled
from ops_jobs import Inputs, compared, kernels_here

from megatron_ssm_tp.ops import ssd_reference
from megatron_ssm_tp.ops.ssd_reference import NO_LIMIT

_ARGUMENTS = ("x", "dt", "A", "B", "C", "D", "dt_bias")
_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-4, torch.bfloat16: 0.05}  # of the root mean square, for any value


@dataclass(frozen=True)
class SSDCase:
    """Packed prompts. `how` are SSDLaunch's fields; `gap` is how much wider rows and slots are than what is in them."""

    lengths: tuple[int, ...] = (5,)
    heads: int = 2
    channels: int = 16
    groups: int = 1
    d_state: int = 16
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    limit: tuple[float, float] = NO_LIMIT
    gap: int = 0
    rate: float = 1.0  # how fast states are forgotten
    shock: float | None = None  # dt of every twentieth token
    bound: float | None = None  # of errors, in place of _BOUNDS
    backwards: bool = False  # the order of a kernel's programs
    seed: int = 0
    how: dict = field(default_factory=dict)


def inputs_of(case: SSDCase) -> Inputs:
    """Inputs as the mixer has them: x, B and C are bands of the convolution's rows, dt is one of in_proj's."""
    g = torch.Generator().manual_seed(case.seed)
    total, sizes = sum(case.lengths), [case.heads * case.channels, *[case.groups * case.d_state] * 2]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    x, B, C, _ = normal(total, sum(sizes) + case.gap).to(case.dtype).split([*sizes, case.gap], dim=-1)
    tokens = {"x": x.unflatten(-1, (case.heads, -1)), "dt": normal(total, case.gap + case.heads)[:, case.gap :]}
    if case.shock is not None:
        tokens["dt"][3::20] = case.shock
    tokens["dt"] = tokens["dt"].to(case.dtype)
    tokens |= {"B": B.unflatten(-1, (case.groups, -1)), "C": C.unflatten(-1, (case.groups, -1))}
    A = -case.rate * torch.exp(normal(case.heads))
    weights = {"A": A, "D": normal(case.heads), "dt_bias": normal(case.heads).to(case.dtype) - 1}
    slots_total, size = len(case.lengths) + 2, case.heads * case.channels * case.d_state
    states = normal(slots_total, size + case.gap).to(case.state_dtype)[:, :size]
    states = states.unflatten(1, (case.heads, case.channels, case.d_state))
    slots = torch.randperm(slots_total, generator=g)[: len(case.lengths)]
    cu_seqlens = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0)], dtype=torch.int32)
    return Inputs(tokens, weights, states, slots, cu_seqlens)


def _arguments(given: Inputs, tokens: slice = slice(None)) -> list[torch.Tensor]:
    return [given.tokens[n][tokens] if n in given.tokens else given.weights[n] for n in _ARGUMENTS]


def _kernels(case: SSDCase):
    kernels_here()
    from megatron_ssm_tp.ops import ssd

    return ssd, ssd.SSDLaunch(**case.how) if case.how else None


def compare_prefill(case: SSDCase, at: int | None = None) -> str:
    """Prompts by the reference, and by the kernels; given a number `at`, one prompt cut there and in two calls."""
    given, (ssd, how) = inputs_of(case), _kernels(case)
    parts = [(slice(None), given.cu_seqlens)]
    if at is not None:
        rest = sum(case.lengths) - at
        parts = [(slice(0, at), torch.tensor([0, at])), (slice(at, None), torch.tensor([0, rest]))]

    def by_kernels(states: torch.Tensor) -> torch.Tensor:
        called = [
            ssd.ssd_varlen(*_arguments(given, part), case.limit, states, given.slots, cu_seqlens, how)
            for part, cu_seqlens in parts
        ]
        return torch.cat(called)

    where = (given.slots, given.cu_seqlens)
    return compared(
        case,
        given,
        by_kernels,
        lambda states: ssd_reference.ssd_varlen(*_arguments(given), case.limit, states, *where),
        case.bound or _BOUNDS[case.dtype],
    )


def compare_step(case: SSDCase) -> str:
    """One token of each request; the lengths are ones."""
    given, (ssd, _) = inputs_of(case), _kernels(case)
    arguments = (*_arguments(given), case.limit)
    return compared(
        case,
        given,
        lambda states: ssd.ssd_step(*arguments, states, given.slots),
        lambda states: ssd_reference.ssd_step(*arguments, states, given.slots),
    )


def errors_in_bfloat16(case: SSDCase) -> list[tuple[float, float]]:
    """Relative errors of y and of the final state, by the kernels and by `in_bfloat16_products`; one sequence."""
    given, (ssd, how) = inputs_of(case), _kernels(case)
    how = how or ssd.launch_for(case.dtype, case.d_state)
    exact = [t.double() if t.is_floating_point() else t for t in _arguments(given)]
    dense = [t[None] if name in given.tokens else t for name, t in zip(_ARGUMENTS, exact, strict=True)]
    initial = given.states[given.slots].double()
    true_y, true_state = in_products_of(torch.float64, *dense, initial, how.block)
    found_y, found_state = in_products_of(torch.bfloat16, *dense, initial, how.block)
    states = given.states.clone()
    y = ssd.ssd_varlen(*_arguments(given), case.limit, states, given.slots, given.cu_seqlens, how)

    def error(found: torch.Tensor, true: torch.Tensor) -> float:
        return float((found.double() - true).norm() / true.norm())

    return [
        (error(y, true_y[0]), error(found_y.bfloat16(), true_y)),
        (error(states[given.slots], true_state), error(found_state, true_state)),
    ]


def errors_of_the_tool(dtype: torch.dtype) -> list[float]:
    """What tools/bench_ssd.py finds, on the CPU."""
    kernels_here()
    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    import bench_ssd

    bench_ssd.DEVICE = "cpu"
    return bench_ssd.errors(bench_ssd.Shape("small", 4, 16, 2, 32), [70, 1, 64, 3], dtype, None)


def in_products_of(dtype, x, dt, A, B, C, D, dt_bias, state, block):
    """The reference's formula (ssd_reference._chunk) in float64, but for what is multiplied: rounded to `dtype`."""

    def product(formula: str, *factors: torch.Tensor) -> torch.Tensor:
        return torch.einsum(formula, *(t.to(dtype).double() for t in factors))

    step = torch.nn.functional.softplus(dt + dt_bias)
    per_group = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(per_group, dim=2) for t in (B, C))
    outputs = []
    for start in range(0, x.shape[1], block):
        part = slice(start, start + block)
        total = (step[:, part] * A).cumsum(1)
        weights = torch.exp(total[:, :, None] - total[:, None]) * step[:, None, part]
        weights = weights * product("bthn,bshn->btsh", C[:, part], B[:, part])
        weights = torch.where(torch.ones_like(weights[0, ..., 0]).tril().bool()[None, ..., None], weights, 0.0)
        before = product("bthn,bhpn->bthp", C[:, part], state) * total.exp()[..., None]
        outputs.append(before + product("btsh,bshp->bthp", weights, x[:, part]))
        weighted = x[:, part] * (torch.exp(total[:, -1:] - total) * step[:, part])[..., None]
        state = state * total[:, -1].exp()[..., None, None] + product("bshp,bshn->bhpn", weighted, B[:, part])
    return torch.cat(outputs, 1) + x * D[:, None], state


def compiled_for(arch: int, kernel: str, dtype: str, channels: int, d_state: int, at_rest: bool = True):
    """A kernel of ssd_*triton.py, compiled for sm_`arch` as it is launched by default."""
    from megatron_ssm_tp.ops import ssd

    function = getattr(ssd, kernel)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    how = asdict(ssd.launch_for(torch_dtype, d_state))
    product, precision = ssd._PRODUCTS[torch_dtype]
    channels = min(channels, how["channels"])
    constants = {"P": channels, "N": d_state, "BLOCK": how["block"], "HEADS": 16, "MASKED": False, "channel_blocks": 1}
    constants |= {"PRODUCT": product, "PRECISION": precision, "ONE_EACH": True, "AT_REST": at_rest, "OVERLAPS": True}
    of_states = {"chunk_states": "states_", "scan_chunks": ""}.get(kernel)
    options = {"num_warps": 4}
    if of_states is not None:
        options = {"num_warps": how[of_states + "warps"], "num_stages": how[of_states + "stages"]}
    names = function.arg_names

    def type_of(name: str) -> str:
        if name in ("slots_ptr", "cu_seqlens_ptr"):
            return "*i64" if name == "slots_ptr" else "*i32"
        if name.endswith("_ptr"):
            narrow = name in ("x_ptr", "B_ptr", "C_ptr", "out_ptr", "dt_ptr", "dt_bias_ptr")
            return "*" + (dtype if narrow else "fp32")
        return "fp32" if name in ("dt_min", "dt_max") else "i32"

    types = {name: type_of(name) for name in names}
    constants = {name: value for name, value in constants.items() if name in names}
    return compiled(function, types, constants, options, ("_ptr", "_stride", "channels", "d_state", "heads"), arch)
