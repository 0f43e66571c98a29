"""Who computes scans and convolutions: picked once, when a mixer is built, by what is there."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import UserError
from . import reference

OPS = ("causal_conv1d_varlen", "causal_conv1d_step", "selective_scan_varlen", "selective_state_step")
DENSE = ("causal_conv1d", "selective_scan")  # training's


@dataclass(frozen=True)
class Implementation:
    """The operators of reference.py that mixers call, and whose they are.

    Args:
        name: "triton" or "reference".
        reason: why it was picked.
    """

    name: str
    reason: str
    causal_conv1d_varlen: Callable[..., torch.Tensor]
    causal_conv1d_step: Callable[..., torch.Tensor]
    selective_scan_varlen: Callable[..., torch.Tensor]
    selective_state_step: Callable[..., torch.Tensor]
    causal_conv1d: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    selective_scan: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def implementation(name: str = "auto") -> Implementation:
    """The implementation of that name; "auto" is "triton" where Triton and a CUDA device are, else "reference".

    "triton" has no kernels for the CPU, and none with a backward but for dense sequences: it leaves tensors there, and
    other calls that autograd records, to the reference.

    Raises:
        UserError: there is none of that name, or it cannot run here.
    """
    if name not in ("auto", "triton", "reference"):
        raise UserError("ops", name, "is no implementation", "auto, triton, reference")
    missing = _missing_for_triton()
    if name == "triton" and missing:
        raise UserError("ops", name, f"cannot run here: {missing}", "auto, reference")
    if name == "reference" or missing:
        operators = {op: getattr(reference, op) for op in OPS + DENSE}
        return Implementation("reference", missing if name == "auto" else "asked for", **operators)
    from . import conv1d, conv1d_grad, selective_scan, selective_scan_grad

    kernels = {op: getattr(conv1d if "conv1d" in op else selective_scan, op) for op in OPS}
    operators = {op: partial(_by_tensors, kernels[op], getattr(reference, op)) for op in OPS}
    dense = {op: getattr(conv1d_grad if "conv1d" in op else selective_scan_grad, op) for op in DENSE}
    operators |= {op: partial(_by_device, dense[op], getattr(reference, op)) for op in DENSE}
    return Implementation("triton", "Triton and CUDA are here" if name == "auto" else "asked for", **operators)


def _missing_for_triton() -> str:
    """What the kernels lack, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise  # Triton is there, and something else is broken: the reference in its place would hide it
        return "no Triton"
    return ""


def _by_tensors(kernel: Callable, truth: Callable, x: torch.Tensor, *arguments: torch.Tensor | None) -> torch.Tensor:
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *arguments))
    return (kernel if x.is_cuda and not recorded else truth)(x, *arguments)


def _by_device(kernel: Callable, truth: Callable, x: torch.Tensor, *arguments: torch.Tensor | None) -> tuple:
    return (kernel if x.is_cuda else truth)(x, *arguments)
