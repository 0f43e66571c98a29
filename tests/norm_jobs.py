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


def compare(case: Case) -> str:
    """Both functions."""
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
    ]
    expected = [
        norm.rms_norm(x, weight, EPS),
        *norm.add_rms_norm(x, residual, weight, EPS),
    ]
    parts = torch.stack([rows(torch.float32).expand_as(x).contiguous() for _ in range(3)])
    found += norm_triton.add_rms_norm(parts, residual, weight, EPS, case.launch)
    expected += norm.add_rms_norm(parts, residual, weight, EPS)
    problem = "" if torch.equal(x, before[0]) and torch.equal(residual, before[1]) else "inputs were written"
    names = ("norm", "sum", "norm of the sum", "sum of parts", "norm of the sum of parts")
    for name, ours, theirs in zip(names, found, expected, strict=True):
        problem += _differ(name, ours, theirs, exact=case.powers or name.startswith("sum"))
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


def split(shape: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, int], eps: float | None) -> str:
    """bcdt.py's kernel, of rows with gaps between them whose sums of squares are exact."""
    patch_interpreter()
    torch.use_deterministic_algorithms(True)
    from megatron_ssm_tp.ops.bcdt import split_bcdt
    from megatron_ssm_tp.ops.bcdt_triton import split_bcdt as kernel
    from megatron_ssm_tp.ops.selective_scan import ScanShape, packed_bc

    g, (dt_rank, d_state) = torch.Generator().manual_seed(1), sizes
    wide = torch.randint(-2, 3, (*shape, dt_rank + 2 * d_state + 3), generator=g)
    bcdt = torch.exp2(wide).to(dtype)[..., 3:]
    given = (*sizes, eps, dtype)
    found, expected = kernel(bcdt[None], *given), split_bcdt(bcdt[None], *given)
    pairs = zip(("dt", "B and C"), found, (expected[0], expected[1].float()), strict=True)
    problem = "".join(_differ(name, ours, theirs, exact=True) for name, ours, theirs in pairs)
    parts = torch.stack([bcdt * 2, -bcdt, torch.zeros_like(bcdt)]).float()
    if not all(map(torch.equal, kernel(parts, *given), found)):
        problem += "parts are added otherwise; "
    if not shape[0]:
        return problem
    heads = shape[2] if len(shape) > 2 else 1
    B, C = found[1].squeeze(1).chunk(2, dim=-1) if len(shape) > 1 else found[1].chunk(2, dim=-1)
    packed = packed_bc(B, C, ScanShape(shape[0], 1, heads, heads, d_state))
    if not torch.equal(packed.flatten(2), found[1].view(shape[0], heads, -1)):
        problem += "B and C are packed otherwise"
    return problem if packed.data_ptr() == found[1].data_ptr() else problem + "B and C are copied"
