"""What Triton's interpreter is asked about the kernels of ops: where they differ from the references."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from unittest import mock

import torch
from interpreter import patch_interpreter, programs_backwards

from megatron_ssm_tp.ops import reference


@dataclass(frozen=True)
class Case:
    """Packed prompts. `how` are ScanLaunch's fields; `gap` is how much wider than D the rows of x, z and dt are."""

    lengths: tuple[int, ...] = (5,)
    channels: int = 7
    d_state: int = 16
    heads: int | None = None
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    gap: int = 0
    slot_gap: int = 0
    steady: bool = False  # little is forgotten
    backwards: bool = False  # the order of a kernel's programs
    seed: int = 0
    how: dict = field(default_factory=dict)


@dataclass
class Inputs:
    tokens: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    states: torch.Tensor
    slots: torch.Tensor
    cu_seqlens: torch.Tensor


def inputs_of(case: Case, width: int | None = None) -> Inputs:
    """Inputs of a scan, or given a width of a convolution, as views of wider rows."""
    g = torch.Generator().manual_seed(case.seed)
    total, D, N, H = sum(case.lengths), case.channels, case.d_state, case.heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    def rows(size: int, *shape: int) -> torch.Tensor:
        return normal(total, *shape, size + case.gap).to(case.dtype)[..., case.gap :]

    xz = normal(total, 2 * D + 2 * case.gap).to(case.dtype)
    tokens = {"x": xz[:, :D], "z": xz[:, -D:], "dt": rows(D)}
    bc = rows(2 * N, *([H] if H else []))
    tokens |= {"B": bc[..., :N], "C": bc[..., N:]}
    rate = torch.exp(normal(D, N)) * torch.arange(1, N + 1)
    weights = {"A": -rate * (1e-3 if case.steady else 1), "D": normal(D), "dt_bias": normal(D) - 1}
    if width:
        weights = {"weight": normal(D, width).to(case.dtype), "bias": normal(D).to(case.dtype)}
    slots_total = len(case.lengths) + 2
    states = normal(slots_total, (D + case.slot_gap) * (width or N))[:, : D * (width or N)]
    states = states.to(case.state_dtype).unflatten(1, (D, -1))
    slots = torch.randperm(slots_total, generator=g)[: len(case.lengths)]
    cu_seqlens = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0)], dtype=torch.int32)
    return Inputs(tokens, weights, states, slots, cu_seqlens)


def kernels_here():
    """The modules of kernels, in an interpreter that shows memory that nobody wrote."""
    patch_interpreter()
    # Fills torch.empty with NaN: whoever reads memory that nobody wrote is seen.
    torch.use_deterministic_algorithms(True)
    from megatron_ssm_tp.ops import conv1d, selective_scan

    return conv1d, selective_scan


def _differ(name: str, found: torch.Tensor, expected: torch.Tensor, unit: float, bound: float) -> str:
    """Where two tensors differ by more than `bound` of their root mean square and a unit of their own last place."""
    if found.dtype != expected.dtype or found.shape != expected.shape or not found.is_contiguous():
        return f"{name}: {found.dtype} {tuple(found.shape)} strides {found.stride()}"
    scale = expected.float().square().mean().sqrt()
    wrong = ~((found.float() - expected.float()).abs() <= bound * scale + unit * expected.float().abs())
    at = wrong.nonzero()
    return "" if not len(at) else f"{name} {at[:3].tolist()}: {found[wrong][:3]} for {expected[wrong][:3]}; "


def compared(case: Case, given: Inputs, kernel, truth, bound: float = 1e-4) -> str:
    """Outputs of kernel(states) and truth(states), the states they leave, and those they should not touch."""
    before = {name: t.clone() for name, t in given.tokens.items()}
    base = given.states
    expected_states = base.clone()
    with programs_backwards() if case.backwards else nullcontext():
        y = kernel(base)
    expected = truth(expected_states)
    unit = 2 * torch.finfo(case.dtype).eps if case.dtype != torch.float32 else 0.0
    state_unit = 2 * torch.finfo(case.state_dtype).eps if case.state_dtype != torch.float32 else 0.0
    problem = _differ("y", y, expected, unit, bound)
    problem += _differ("states", base.clone(memory_format=torch.contiguous_format), expected_states, state_unit, bound)
    idle = [slot for slot in range(len(base)) if slot not in given.slots]
    if not torch.equal(base[idle], expected_states[idle]):
        problem += "a slot of no request was written; "
    if any(not torch.equal(t, before[name]) for name, t in given.tokens.items()):
        problem += "inputs were written"
    return problem


_SCAN = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def _scan_arguments(given: Inputs, tokens: slice = slice(None)) -> list[torch.Tensor]:
    return [given.tokens[n][tokens] if n in given.tokens else given.weights[n] for n in _SCAN]


def compare_scan(case: Case) -> str:
    given, kernels = inputs_of(case), kernels_here()[1]
    how, where = kernels.ScanLaunch(**case.how) if case.how else None, (given.slots, given.cu_seqlens)
    arguments = _scan_arguments(given)
    return compared(
        case,
        given,
        lambda states: kernels.selective_scan_varlen(*arguments, states, *where, how),
        lambda states: reference.selective_scan_varlen(*arguments, states, *where),
    )


def compare_scan_by_eights(case: Case) -> str:
    """compare_scan, with kernels that look at eight sequences at once."""
    kernels_here()
    from triton.language import constexpr

    from megatron_ssm_tp.ops import lanes_triton

    with mock.patch.object(lanes_triton, "_SEARCH", constexpr(8)):
        return compare_scan(case)


def compare_step(case: Case) -> str:
    """One token of each request; the lengths are ones."""
    given, kernels = inputs_of(case), kernels_here()[1]
    arguments = _scan_arguments(given)
    return compared(
        case,
        given,
        lambda states: kernels.selective_state_step(*arguments, states, given.slots),
        lambda states: reference.selective_state_step(*arguments, states, given.slots),
    )


def compare_split_scan(case: Case, at: int) -> str:
    """One prompt whole by the reference, and in two calls by the kernel."""
    given, kernels = inputs_of(case), kernels_here()[1]
    how, length = kernels.ScanLaunch(**case.how) if case.how else None, sum(case.lengths)

    def in_two(states: torch.Tensor) -> torch.Tensor:
        parts = [
            kernels.selective_scan_varlen(
                *_scan_arguments(given, part), states, given.slots, torch.tensor([0, part.stop - part.start]), how
            )
            for part in (slice(0, at), slice(at, length))
        ]
        return torch.cat(parts)

    whole = (given.slots, given.cu_seqlens)
    return compared(
        case,
        given,
        in_two,
        lambda states: reference.selective_scan_varlen(*_scan_arguments(given), states, *whole),
    )


def compare_conv(case: Case, width: int, bias: bool, tile: tuple[int, int, int, int]) -> str:
    given, kernels = inputs_of(case, width), kernels_here()[0]
    weights = (given.weights["weight"], given.weights["bias"] if bias else None)
    where = (given.slots, given.cu_seqlens)
    x = given.tokens["x"]
    return compared(
        case,
        given,
        lambda states: kernels.causal_conv1d_varlen(x, *weights, states, *where, tile),
        lambda states: reference.causal_conv1d_varlen(x, *weights, states, *where),
    )


def compare_split_conv(case: Case, width: int, at: int) -> str:
    given, kernels = inputs_of(case, width), kernels_here()[0]
    x, weights, length = given.tokens["x"], tuple(given.weights.values()), sum(case.lengths)

    def in_two(states: torch.Tensor) -> torch.Tensor:
        parts = [(x[:at], torch.tensor([0, at])), (x[at:], torch.tensor([0, length - at]))]
        tile = (8, 16, 1, 4)
        return torch.cat(
            [kernels.causal_conv1d_varlen(part, *weights, states, given.slots, cu, tile) for part, cu in parts]
        )

    return compared(
        case,
        given,
        in_two,
        lambda states: reference.causal_conv1d_varlen(x, *weights, states, given.slots, given.cu_seqlens),
    )


def compare_conv_step(case: Case, width: int, bias: bool) -> str:
    given, kernels = inputs_of(case, width), kernels_here()[0]
    weights = (given.weights["weight"], given.weights["bias"] if bias else None)
    x = given.tokens["x"]
    return compared(
        case,
        given,
        lambda states: kernels.causal_conv1d_step(x, *weights, states, given.slots),
        lambda states: reference.causal_conv1d_step(x, *weights, states, given.slots),
    )


def touched_by_padding(case: Case, width: int) -> bool:
    """Whether steps of requests without a slot, which Megatron pads batches with as -1, write any state."""
    conv, scan = kernels_here()[:2]
    given, wide = inputs_of(case), inputs_of(case, width)
    nowhere = torch.full((len(case.lengths),), -1)
    states, conv_states = given.states[1:].clone(), wide.states[1:].clone()
    around = torch.cat([states.flatten(), conv_states.flatten()])
    scan.selective_state_step(*_scan_arguments(given), states[1:], nowhere)
    conv.causal_conv1d_step(wide.tokens["x"], *wide.weights.values(), conv_states[1:], nowhere)
    return not torch.equal(around, torch.cat([states.flatten(), conv_states.flatten()]))


def strided_arguments() -> str:
    """A bias, slots and cu_seqlens that are columns of wider tensors, in all that read them."""
    patch_interpreter()
    from megatron_ssm_tp.ops import conv1d, conv1d_grad

    g = torch.Generator().manual_seed(2)
    x, weight = torch.randn(9, 7, generator=g), torch.randn(7, 4, generator=g)
    bias, slots = torch.randn(7, 2, generator=g)[:, 0], torch.tensor([[3, 9], [0, 9]])[:, 0]
    cu_seqlens = torch.tensor([[0, 7], [5, 7], [9, 7]], dtype=torch.int32)[:, 0]
    found = []
    for ours, theirs, more in (
        (conv1d.causal_conv1d_varlen, reference.causal_conv1d_varlen, (slots, cu_seqlens)),
        (conv1d.causal_conv1d_step, reference.causal_conv1d_step, (slots,)),
    ):
        rows = x if len(more) == 2 else x[:2]
        states = torch.randn(5, 7, 4, generator=g)
        kept = states.clone()
        same = torch.allclose(
            ours(rows, weight, bias, states, *more), theirs(rows, weight, bias, kept, *more), atol=1e-5
        )
        found.append(same and torch.allclose(states, kept, atol=1e-5))
    y = conv1d_grad._CausalConv1d.apply(x[None], weight, bias, conv1d_grad.ConvLaunch())
    found.append(torch.allclose(y, reference.causal_conv1d(x[None], weight, bias)[0], atol=1e-5))
    return "" if all(found) else str(found)
