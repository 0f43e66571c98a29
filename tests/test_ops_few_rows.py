"""Products of few rows, and Mamba-1's step from x_proj on, in Triton's interpreter against torch and the references."""

import re

import few_rows_jobs as jobs
import pytest
import torch
from hopper import compile_for_hopper
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ssm_tp.ops import dt_step
from megatron_ssm_tp.ops.few_rows import few_rows_linear, few_rows_parts, joined
from megatron_ssm_tp.ops.few_rows_launch import FewRowsLaunch, TilesLaunch, pick_launch, pick_tiles

pytest.importorskip("triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.integers(1, 4),
    rows=st.sampled_from([1, 9, 37]),
    columns=st.sampled_from([16, 100, 1024, 1500, 4100]),
    dtype=st.sampled_from(DTYPES),
    gap=st.sampled_from([0, 8, 3]),
    launch=st.sampled_from([None, FewRowsLaunch(4, 256, 1, 4), FewRowsLaunch(16, 128, 2, 3)]),
)
def test_products_are_torchs(interpreted, requests, rows, columns, dtype, gap, launch):
    assert interpreted(jobs.product, requests, rows, columns, dtype, gap, launch) == ""


@settings(max_examples=25, deadline=None)
@given(
    requests=st.sampled_from([1, 3, 16, 20]),
    rows=st.sampled_from([1, 16, 37]),
    columns=st.sampled_from([64, 192]),
    dtype=st.sampled_from(DTYPES),
    gap=st.sampled_from([0, 8, 3]),
    launch=st.sampled_from([TilesLaunch(1, 2, 16, 32), TilesLaunch(2, 2, 16, 32), TilesLaunch(1, 3, 32, 64)]),
)
def test_tiles_are_torchs(interpreted, requests, rows, columns, dtype, gap, launch):
    assert interpreted(jobs.tiles, requests, rows, columns, dtype, gap, launch) == ""


@pytest.mark.parametrize(
    ("shape", "launch"),
    [
        ((16384, 4096, 8), TilesLaunch(1, stages=5, rows=128)),
        ((16384, 4096, 17), TilesLaunch(1)),
        ((8192, 4096, 8), TilesLaunch(1, stages=5)),
        ((16384, 4096, 64), TilesLaunch(1, stages=3)),
        ((8192, 256, 64), TilesLaunch(1)),
        ((4096, 8192, 8), TilesLaunch(2, stages=5)),
        ((4096, 8192, 64), TilesLaunch(2)),
        ((288, 8192, 64), TilesLaunch(16)),
        ((2560, 5120, 9), TilesLaunch(4)),
        ((4096, 4096, 2), None),
        ((4096, 4096, 65), None),
        ((4096, 4000, 8), None),
        ((4096, 128, 8), None),
    ],
)
def test_tiles_are_picked(shape, launch):
    assert pick_tiles(*shape) == launch


@settings(max_examples=20, deadline=None)
@given(
    requests=st.sampled_from([1, 3, 8]),
    channels=st.sampled_from([1, 33, 64]),
    dt_rank=st.sampled_from([1, 7, 20]),
    d_state=st.sampled_from([5, 16]),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([None, 1e-5]),
)
def test_the_step_is_the_three_apart(interpreted, requests, channels, dt_rank, d_state, dtype, eps):
    assert interpreted(jobs.step, requests, channels, dt_rank, d_state, dtype, eps) == ""


def test_the_cpu_and_autograd_are_torchs():
    x, weight = torch.randn(2, 1, 5), torch.randn(3, 5, requires_grad=True)
    torch.testing.assert_close(few_rows_linear(x, weight), x @ weight.T)
    assert few_rows_linear(x, weight).requires_grad
    torch.testing.assert_close(joined(few_rows_parts(x, weight), x.dtype), x @ weight.T)
    assert dt_step.fits(2, 256) and not dt_step.fits(3, 256) and not dt_step.fits(1, 2000) and not dt_step.fits(0, 8)


@pytest.mark.parametrize(("rows", "columns", "requests"), [(16384, 4096, 1), (288, 8192, 2), (8192, 256, 1)])
def test_products_compile_for_hopper_without_spills(rows, columns, requests):
    from megatron_ssm_tp.ops.few_rows_triton import lane_sums

    how = pick_launch(rows, columns, requests)
    types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32", "x_stride": "i32"}
    constants = {"UNIT": 8, "COLUMNS": columns, "REQUESTS": requests}
    constants |= {"ROWS": how.rows, "BLOCK_K": how.block_k, "STAGES": how.stages, "OVERLAPS": True}
    ptx = compile_for_hopper(lane_sums, types, constants, how.warps).asm["ptx"]
    assert re.search(r"ld\.global\.L1::evict_first\S*\.v4\.b32", ptx)  # of the weight, 16 bytes a thread
    assert ".local" not in ptx


@pytest.mark.parametrize(("rows", "columns", "requests"), [(16384, 4096, 8), (16384, 4096, 64), (288, 8192, 64)])
def test_tiles_compile_for_hopper(rows, columns, requests):
    from megatron_ssm_tp.ops.tiles_triton import tile_sums

    how = pick_tiles(rows, columns, requests)
    types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*fp32"}
    types |= dict.fromkeys(("requests", "rows", "x_stride"), "i32")
    constants = {
        "UNIT": 8,
        "COLUMNS": columns,
        "PART": columns // how.parts,
        "AHEAD": 256,
        "REQUESTS": max(16, requests),
    }
    constants |= {"ROWS": how.rows, "BLOCK_K": how.block_k, "STAGES": how.stages, "OVERLAPS": True}
    made = compile_for_hopper(tile_sums, types, constants, how.warps)
    assert made.metadata.shared <= 227 * 1024 and ".local" not in made.asm["ptx"]
    assert "cp.async.cg" in made.asm["ptx"]
    asked, waited = (made.asm["ptx"].index(word) for word in ("bulk.prefetch.L2", "griddepcontrol.wait"))
    assert asked < waited


@pytest.mark.parametrize("at_rest", [True, False])
def test_the_step_compiles_for_hopper(at_rest):
    from megatron_ssm_tp.ops.dt_step_triton import dt_step as kernel

    tensors = ("bcdt", "x", "z", "out", "weight", "dt_bias")
    types = {f"{name}_ptr": "*bf16" for name in tensors}
    types |= {f"{name}_ptr": "*fp32" for name in ("A", "D", "states")} | {"slots_ptr": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(("channels", "x_stride", "z_stride", "bcdt_stride", "state_stride"), "i32")
    constants = {"RANK": 256, "D_STATE": 16, "R": 256, "N": 16, "CHANNELS": 32, "NORMED": True}
    constants |= {"AT_REST": at_rest, "OVERLAPS": True}
    ptx = compile_for_hopper(kernel, types, constants, 4).asm["ptx"]
    before, _ = ptx.split("griddepcontrol.wait")
    assert ".local" not in ptx
    assert ("ld.global.b64" in before) == at_rest  # of slots: dt_proj's weight is read before in any case
