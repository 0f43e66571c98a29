"""What Triton's interpreter is asked about the kernel of norms: where it differs from the references."""

from dataclasses import dataclass

import torch
from interpreter import patch_interpreter

from megatron_ssm_tp.ops import norm

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """Tensors [.., columns]; `gap` is how much wider the rows of x and residual are; launch: rows and warps of a
    program."""

    shape: tuple[int, ...] = (3, 40)
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    residual_dtype: torch.dtype = torch.bfloat16
    gap: int = 0
    launch: tuple[int, int] | None = None
    powers: bool = False  # values whose squares float32 sums exactly, in any order


def compare(case: Case, sizes: tuple[int, ...]) -> str:
    """The three functions, the last by runs of `sizes` columns."""
    patch_interpreter()
    # Fills torch.empty with NaN: whoever reads memory that nobody wrote is seen.
    torch.use_deterministic_algorithms(True)
    from megatron_ssm_tp.ops import norm_triton

    g = torch.Generator().manual_seed(sum(case.shape))

    def rows(dtype: torch.dtype) -> torch.Tensor:
        shape = (*case.shape[:-1], case.shape[-1] + case.gap)
        if case.powers:
            return torch.exp2(torch.randint(-2, 3, shape, generator=g)).to(dtype)[..., case.gap :]
        return (torch.randn(shape, generator=g) * 3).to(dtype)[..., case.gap :]

    x, residual = rows(case.dtype), rows(case.residual_dtype)
    weight = torch.randn(case.shape[-1], generator=g).to(case.weight_dtype)
    before = x.clone(), residual.clone()
    found = [
        norm_triton.rms_norm(x, weight, EPS, case.launch),
        *norm_triton.add_rms_norm(x, residual, weight, EPS, case.launch),
        norm_triton.rms_normalize_slices(x, sizes, EPS, case.launch),
    ]
    expected = [
        norm.rms_norm(x, weight, EPS),
        *norm.add_rms_norm(x, residual, weight, EPS),
        norm.rms_normalize_slices(x, sizes, EPS),
    ]
    problem = "" if torch.equal(x, before[0]) and torch.equal(residual, before[1]) else "inputs were written"
    names = ("norm", "sum", "norm of the sum", "slices")
    for name, ours, theirs in zip(names, found, expected, strict=True):
        problem += _differ(name, ours, theirs, exact=case.powers or name == "sum")
    return problem


def _differ(name: str, found: torch.Tensor, expected: torch.Tensor, exact: bool) -> str:
    """Where two tensors differ: by anything, or by what another order of a sum can do to three roundings."""
    if found.dtype != expected.dtype or found.shape != expected.shape or not found.is_contiguous():
        return f"{name}: {found.dtype} {tuple(found.shape)} strides {found.stride()}"
    off = (found.double() - expected.double()).abs() / expected.double().abs().clamp_min(1e-6)
    limit = 0.0 if exact else 3 * torch.finfo(expected.dtype).eps
    wrong = ~(off <= limit)
    if not exact and expected.numel() > 99 and (off > torch.finfo(torch.float32).eps * 8).float().mean() > 0.02:
        return f"{name}: {off.count_nonzero()} of {off.numel()} are rounded otherwise; "
    return f"{name}: {found[wrong][:3]} for {expected[wrong][:3]}; " if wrong.any() else ""
