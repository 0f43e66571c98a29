"""Inputs for the operators of megatron_ssm_tp.ops, and what float64, mamba-ssm and causal-conv1d make of them.

For check_ops.py and bench_ops.py. Prompts are packed end to end; steps are one token of each request.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch

from megatron_ssm_tp.ops import reference

# name: the function of ops, which of its tensors have a row a token, whose else is it
FUNCTIONS = {
    "scan": "selective_scan_varlen",
    "scan step": "selective_state_step",
    "conv": "causal_conv1d_varlen",
    "conv step": "causal_conv1d_step",
}
_TOKEN_ARGUMENTS = {"scan": (0, 1, 3, 4, 6), "scan step": (0, 1, 3, 4, 6), "conv": (0,), "conv step": (0,)}
DT_MIN, DT_MAX = 1e-3, 0.1


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Args:
        op: a key of FUNCTIONS.
        lengths: tokens of each prompt; ones for a step.
        width: d_state, or the taps of a convolution.
        dtype: of x, dt, z, B, C, y and a convolution's weights; a scan's other weights and its states are float32.
        initial: states before the call are random, not zero.
        steady: little is forgotten: A is a thousandth of what models are initialized with.
    """

    op: str
    lengths: tuple[int, ...]
    channels: int
    width: int = 16
    dtype: torch.dtype = torch.bfloat16
    initial: bool = False
    steady: bool = False
    seed: int = 0

    @property
    def is_step(self) -> bool:
        return self.op.endswith("step")

    @property
    def is_scan(self) -> bool:
        return self.op.startswith("scan")


class Given(NamedTuple):
    """Arguments: `leading` are all before the states, in the operator's order."""

    leading: tuple[torch.Tensor, ...]
    states: torch.Tensor
    slots: torch.Tensor
    cu_seqlens: torch.Tensor


def draw(case: Case, device: torch.device) -> Given:
    """Values like a model's: x and z are halves of wider rows, B and C ends of others, softplus(dt) is 1e-3 to 0.1."""
    generator = torch.Generator(device).manual_seed(case.seed)
    total, D, N = sum(case.lengths), case.channels, case.width

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    xz = normal(total, 2 * D).to(case.dtype)
    if case.is_scan:
        bc = normal(total, 8 + 2 * N).to(case.dtype)
        dt = torch.exp(torch.rand(D, device=device, generator=generator) * 4.6 - 6.9)
        rates = torch.arange(1, N + 1, device=device) * torch.exp(0.2 * normal(D, N)) * (1e-3 if case.steady else 1)
        leading = (xz[:, :D], (0.7 * normal(total, D)).to(case.dtype), -rates, bc[:, 8 : 8 + N], bc[:, 8 + N :])
        leading += (normal(D), xz[:, D:], dt + torch.log(-torch.expm1(-dt)))
    else:
        leading = (xz[:, :D], normal(D, N).to(case.dtype), normal(D).to(case.dtype))
    requests = len(case.lengths)
    states = normal(requests + 2, D, N) * (1.0 if case.initial else 0.0)
    slots = torch.arange(requests, 0, -1, device=device)  # neither in order nor all
    lengths = torch.tensor([0, *case.lengths], device=device)
    kept = torch.float32 if case.is_scan else case.dtype
    return Given(leading, states.to(kept), slots, lengths.cumsum(0).int())


def ours(case: Case) -> Callable[..., torch.Tensor]:
    """The Triton operator. Triton is first imported here: with TRITON_INTERPRET set, it interprets."""
    from megatron_ssm_tp.ops import conv1d, selective_scan

    return getattr(selective_scan if case.is_scan else conv1d, FUNCTIONS[case.op])


def call(case: Case, function: Callable[..., torch.Tensor], given: Given) -> torch.Tensor:
    """y [T, D]; given.states are written."""
    cu_seqlens = () if case.is_step else (given.cu_seqlens,)
    return function(*given.leading, given.states, given.slots, *cu_seqlens)


def part(case: Case, given: Given, begin: int, end: int) -> Given:
    """Tokens begin .. end of a single prompt, with the same states."""
    leading = [t[begin:end] if i in _TOKEN_ARGUMENTS[case.op] else t for i, t in enumerate(given.leading)]
    bounds = torch.tensor([0, end - begin], dtype=torch.int32, device=given.slots.device)
    return given._replace(leading=tuple(leading), cu_seqlens=bounds)


@contextmanager
def _float_is_double() -> Iterator[None]:
    """ops.reference computes in float32, by Tensor.float(); within this it computes in float64."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def exact(case: Case, given: Given, channels: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """y [T, channels] and the states [slots, channels, width] after it, by ops.reference in float64; given is left.

    Args:
        channels: only so many of the first, as no channel depends on another; None is all.
    """
    taken = slice(None, channels)
    own = range(len(given.leading)) if not case.is_scan else (0, 1, 2, 5, 6, 7)  # all but B and C
    leading = []
    for index, tensor in enumerate(given.leading):
        if index in own:
            tensor = tensor[:, taken] if index in _TOKEN_ARGUMENTS[case.op] else tensor[taken]
        leading.append(tensor.double())
    copied = given._replace(leading=tuple(leading), states=given.states[:, taken].double())
    with _float_is_double():
        y = call(case, getattr(reference, FUNCTIONS[case.op]), copied)
    return y, copied.states


# --- mamba-ssm and causal-conv1d ------------------------------------------------------------------------------------


def _importable(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def rival(case: Case, given: Given) -> Callable[[], torch.Tensor] | None:
    """What runs theirs on the same values, or None where it is not installed or has no such call.

    Theirs takes no state into a prompt, and prompts of one length. Their layouts are made beforehand: x, dt and z
    [b, D, l]. Steps write given.states.

    Returns:
        y: [b, D, l] of prompts, [s, D] of steps.
    """
    if not torch.cuda.is_available() or not _importable("mamba_ssm" if case.is_scan else "causal_conv1d"):
        return None
    if case.is_step:
        return _rival_step(case, given)
    if case.initial or len(set(case.lengths)) > 1:
        return None
    if case.is_scan:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        x, dt, A, B, C, D, z, bias = given.leading
        x, dt, B, C, z = (_batched(case, t) for t in (x, dt, B, C, z))
        return lambda: selective_scan_fn(x, dt, A, B, C, D, z, bias, True)
    from causal_conv1d import causal_conv1d_fn

    x, (weight, bias) = _batched(case, given.leading[0]), given.leading[1:]
    return lambda: causal_conv1d_fn(x, weight, bias, activation="silu")


def _batched(case: Case, tokens: torch.Tensor) -> torch.Tensor:
    """[T, n] -> [b, n, l]"""
    return tokens.reshape(len(case.lengths), case.lengths[0], -1).transpose(1, 2).contiguous()


def as_packed(case: Case, y: torch.Tensor) -> torch.Tensor:
    """A rival's y as [T, D]."""
    return y if case.is_step else y.transpose(1, 2).reshape(sum(case.lengths), case.channels)


def _rival_step(case: Case, given: Given) -> Callable[[], torch.Tensor]:
    states = given.states[given.slots].contiguous()
    if case.is_scan:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        x, dt, A, B, C, D, z, bias = (t.contiguous() for t in given.leading)
        return lambda: selective_state_update(states, x, dt, A, B, C, D, z, bias, dt_softplus=True)
    from causal_conv1d import causal_conv1d_update

    x, weight, bias = given.leading
    x = x.contiguous()
    return lambda: causal_conv1d_update(x, states, weight, bias, "silu")


# --- Errors ---------------------------------------------------------------------------------------------------------


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what is expected, which is float64."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a value, by its own magnitude and the root mean square of all."""
    scale = expected.abs() + expected.square().mean().sqrt()
    return ((found.double() - expected).abs() / scale).max().nan_to_num(float("inf")).item()
