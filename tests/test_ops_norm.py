"""The norms' kernel in Triton's interpreter against the references, and when it is called."""

import norm_jobs as jobs
import pytest
import torch
from hopper import compile_for_hopper
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_jobs import Case

from megatron_ssm_tp.ops import choose, norm
from megatron_ssm_tp.ops.bcdt import split_bcdt

pytest.importorskip("triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([(0,), (1,), (5,), (3, 1), (2, 3), ()]),
    columns=st.sampled_from([1, 7, 44, 64, 288, 600]),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    gap=st.sampled_from([0, 3]),
    launch=st.sampled_from([None, (1, 4), (4, 1)]),
)
def test_norms_are_the_references(interpreted, rows, columns, dtype, weight_dtype, wide, gap, launch):
    """Up to the order in which a row's squares are summed."""
    case = Case((*rows, columns), dtype, weight_dtype, torch.float32 if wide else dtype, gap, launch)
    assert interpreted(jobs.compare, case) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=["narrow", "wide"])
def test_norms_round_where_the_references_do(interpreted, dtype, weight_dtype, residual_dtype):
    """To the bit, where the order of a sum makes no difference."""
    case = Case((9, 96), dtype, weight_dtype, residual_dtype or dtype, powers=True)
    assert interpreted(jobs.compare, case) == ""


@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 1, 3), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [None, 1e-5], ids=["plain", "normed"])
def test_dt_b_and_c_are_the_references(interpreted, shape, dtype, eps):
    assert interpreted(jobs.split, shape, dtype, (11, 16), eps) == ""


def test_what_autograd_records_and_what_the_cpu_holds_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    weight = torch.ones(4, requires_grad=True)
    assert norm._kernels(torch.ones(2, 4)) is None
    assert norm._kernels(_OnGpu(), weight) is None
    with torch.no_grad():
        assert norm._kernels(_OnGpu(), weight).__name__.endswith("norm_triton")
        assert norm._kernels(_OnGpu(norm.WIDEST + 1), weight) is None
        monkeypatch.setattr(choose, "has_triton", lambda: False)
        assert norm._kernels(_OnGpu(), weight) is None


@pytest.mark.parametrize(
    ("columns", "residual", "weight"), [(4096, None, "*bf16"), (2560, "*fp32", "*bf16"), (44, "*bf16", "*fp32")]
)
def test_the_kernel_compiles_for_gpus_that_are_not_here(columns, residual, weight):
    from megatron_ssm_tp.ops.norm_triton import normalize_rows, tile_of

    rows, width, warps = tile_of(columns)
    types = {"x_ptr": "*bf16", "residual_ptr": residual, "weight_ptr": weight, "stream_ptr": residual}
    types |= {"out_ptr": weight, "rows": "i32", "x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    constants = {"PARTS": 1, "COLUMNS": columns, "WIDTH": width, "ROWS": rows, "OVERLAPS": True}
    ptx = compile_for_hopper(normalize_rows, types, constants, warps).asm["ptx"]
    assert ".target sm_90" in ptx and ("v4.b32" in ptx or columns == 44)


@pytest.mark.parametrize(("bounds", "normed"), [((0, 256, 272, 288), True), ((0, 160, 176, 192), False)])
def test_bcdts_kernel_compiles_for_gpus_that_are_not_here(bounds, normed):
    from megatron_ssm_tp.ops.bcdt_triton import split_rows, tile_of

    rows, width, warps = tile_of(bounds[-1])
    types = {"x_ptr": "*bf16", "dt_ptr": "*bf16", "bc_ptr": "*fp32", "rows": "i32", "x_stride": "i32", "eps": "fp32"}
    constants = {"PARTS": 1, "BOUNDS": bounds, "NORMED": normed, "WIDTH": width, "ROWS": rows, "OVERLAPS": True}
    assert ".target sm_90" in compile_for_hopper(split_rows, types, constants, warps).asm["ptx"]


class _OnGpu:
    is_cuda, requires_grad, get_device = True, False, lambda self: 0

    def __init__(self, columns: int = 4) -> None:
        self.shape = (2, columns)


def test_norms_of_dt_b_and_c_have_gradients():
    x, ours = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    found = torch.autograd.grad(torch.cat(split_bcdt(x[None], 4, 2, 1e-5, x.dtype), dim=-1), x, ours)[0]
    parts = [part / (part.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() for part in x.split([4, 2, 2], dim=-1)]
    torch.testing.assert_close(found, torch.autograd.grad(torch.cat(parts, dim=-1), x, ours)[0])
