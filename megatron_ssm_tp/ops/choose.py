"""Who computes scans and convolutions: picked once, when a mixer is built, by what is there."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import UserError
from . import reference, ssd_reference

TRUTHS = {
    "causal_conv1d_varlen": reference.causal_conv1d_varlen,
    "causal_conv1d_step": reference.causal_conv1d_step,
    "selective_scan_varlen": reference.selective_scan_varlen,
    "selective_state_step": reference.selective_state_step,
    "ssd_varlen": ssd_reference.ssd_varlen,
    "ssd_step": ssd_reference.ssd_step,
}
DENSE = {"causal_conv1d": reference.causal_conv1d, "selective_scan": reference.selective_scan}  # training's


@dataclass(frozen=True)
class Implementation:
    """The operators of reference.py and ssd_reference.py that mixers call, and whose they are.

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
    ssd_varlen: Callable[..., torch.Tensor]
    ssd_step: Callable[..., torch.Tensor]
    causal_conv1d: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    selective_scan: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def implementation(name: str = "auto") -> Implementation:
    """The implementation of that name; "auto" is "triton" where Triton and a CUDA device are, else "reference".

    "triton" has no kernels for the CPU, and none with a backward but for dense sequences: it leaves tensors there or
    on another GPU than the current one, and other calls that autograd records, to the reference.

    Raises:
        UserError: there is none of that name, or it cannot run here.
    """
    if name not in ("auto", "triton", "reference"):
        raise UserError("ops", name, "is no implementation", "auto, triton, reference")
    missing = _missing_for_triton()
    if name == "triton" and missing:
        raise UserError("ops", name, f"cannot run here: {missing}", "auto, reference")
    if name == "reference" or missing:
        return Implementation("reference", missing if name == "auto" else "asked for", **TRUTHS, **DENSE)
    from . import conv1d, conv1d_grad, selective_scan, selective_scan_grad, ssd

    kernels = {
        "causal_conv1d_varlen": conv1d.causal_conv1d_varlen,
        "causal_conv1d_step": conv1d.causal_conv1d_step,
        "selective_scan_varlen": selective_scan.selective_scan_varlen,
        "selective_state_step": selective_scan.selective_state_step,
        "ssd_varlen": ssd.ssd_varlen,
        "ssd_step": ssd.ssd_step,
    }
    operators = {op: partial(_by_tensors, kernels[op], truth) for op, truth in TRUTHS.items()}
    dense = {"causal_conv1d": conv1d_grad.causal_conv1d, "selective_scan": selective_scan_grad.selective_scan}
    operators |= {op: partial(_by_device, dense[op], truth) for op, truth in DENSE.items()}
    return Implementation("triton", "Triton and CUDA are here" if name == "auto" else "asked for", **operators)


def has_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise  # Triton is there, and something else is broken: the reference in its place would hide it
        return False
    return True


def kernels_can_take(x: torch.Tensor, *others: object) -> bool:
    """Whether Triton is there, x is on the current GPU, and autograd records nothing: the kernels have no backward."""
    recorded = torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in (x, *others))
    return _is_here(x) and not recorded and has_triton()


def _is_here(x: torch.Tensor) -> bool:
    """Whether x is on the GPU that Triton launches on."""
    return x.is_cuda and x.get_device() == torch.cuda.current_device()


def _missing_for_triton() -> str:
    """What the kernels lack, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if has_triton() else "no Triton"


def _by_tensors(
    kernel: Callable, truth: Callable, x: torch.Tensor, *arguments: object, **hints: int | None
) -> torch.Tensor:
    return (kernel if kernels_can_take(x, *arguments) else truth)(x, *arguments, **hints)


def _by_device(kernel: Callable, truth: Callable, x: torch.Tensor, *arguments: torch.Tensor | None) -> tuple:
    return (kernel if _is_here(x) else truth)(x, *arguments)
