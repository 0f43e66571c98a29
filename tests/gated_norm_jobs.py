"""What Triton's interpreter is asked about the kernels of the gated norm: where they differ from the references."""

from dataclasses import dataclass

import torch
from interpreter import patch_interpreter

from megatron_ssm_tp.ops import gated_norm

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """y and z [.., channels]; `gap` is how much wider the rows of y and z are."""

    shape: tuple[int, ...] = (3, 40)
    groups: int = 1
    before_gate: bool = False
    dtype: torch.dtype = torch.bfloat16
    gap: int = 0


def compare(case: Case) -> str:
    """The norm, and its two steps where ranks share a group: errors in units of the dtype's precision."""
    patch_interpreter()
    torch.use_deterministic_algorithms(True)
    from megatron_ssm_tp.ops import gated_norm_triton as kernels

    g, dtype = torch.Generator().manual_seed(sum(case.shape)), case.dtype
    wide = (*case.shape[:-1], case.shape[-1] + case.gap)
    y, z = ((torch.randn(wide, generator=g) * 3).to(dtype)[..., case.gap :] for _ in range(2))
    weight = torch.randn(case.shape[-1], generator=g).to(dtype)
    how = (weight, EPS, case.groups, case.before_gate)
    found, expected = kernels.gated_rms_norm(y, z, *how), gated_norm.gated_rms_norm(y, z, *how)
    problem = _differ("norm", found, expected)
    ours = kernels.gated_values(y, z, weight, case.before_gate)
    theirs = gated_norm.gated_values(y, z, weight, case.before_gate)
    return problem + _differ("values", ours[0], theirs[0]) + _differ("squares", ours[1], theirs[1])


def pack(rows: tuple[int, ...], width: int, dtype: torch.dtype, ranks: int) -> str:
    """Products of all ranks with their sums beside them, to the bit; and what is made of their sum."""
    patch_interpreter()
    torch.use_deterministic_algorithms(True)
    from megatron_ssm_tp.ops import gated_norm_triton as kernels

    g, columns, total, problem = torch.Generator().manual_seed(width), 16, 0, ""
    for rank in range(ranks):
        product = torch.randn(*rows, width + 2, generator=g).to(dtype)[..., 2:]
        sums = torch.rand(*rows, 1, generator=g) * 100
        packed = kernels.pack_sums(product, sums, rank, columns)
        if not torch.equal(packed, gated_norm.pack_sums(product, sums, rank, columns)):
            problem += f"rank {rank} packs otherwise; "
        total = total + packed
    found = kernels.unpack_sums(total, columns, EPS)
    return problem + _differ("product", found, gated_norm.unpack_sums(total, columns, EPS))


def _differ(name: str, found: torch.Tensor, expected: torch.Tensor) -> str:
    """By more than float32's rounding, which may move a value to the next of a narrower dtype."""
    if found.dtype != expected.dtype or found.shape != expected.shape or not found.is_contiguous():
        return f"{name}: {found.dtype} {tuple(found.shape)} strides {found.stride()}; "
    off = (found.double() - expected.double()).abs() / expected.double().abs().clamp_min(1e-6)
    limit = 2 * torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 2e-6
    wrong = ~(off <= limit)
    return f"{name}: {found[wrong][:3]} for {expected[wrong][:3]}; " if wrong.any() else ""
