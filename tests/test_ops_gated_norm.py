"""The gated norm's kernels in Triton's interpreter against the references, and for GPUs that are not here."""

import gated_norm_jobs as jobs
import pytest
import torch
from gated_norm_jobs import Case
from hopper import compile_for_hopper
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.sampled_from([(0,), (1,), (5,), (3, 1), (2, 3)]),
    groups=st.sampled_from([1, 2, 8]),
    width=st.sampled_from([1, 5, 44, 64, 600]),
    before_gate=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    gap=st.sampled_from([0, 3, 8]),
)
def test_gated_norms_are_the_references(interpreted, rows, groups, width, before_gate, dtype, gap):
    assert interpreted(jobs.compare, Case((*rows, groups * width), groups, before_gate, dtype, gap)) == ""


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("rows", "width", "ranks"), [((4,), 60, 2), ((3, 1), 64, 4), ((0, 1), 8, 2)])
def test_sums_travel_beside_products(interpreted, rows, width, dtype, ranks):
    assert interpreted(jobs.pack, rows, width, dtype, ranks) == ""


@pytest.mark.parametrize("unit", [1, 8], ids=["rows of 16n", "rows of 8n"])
@pytest.mark.parametrize(
    ("width", "squares", "before_gate"), [(5120, None, False), (3584, None, True), (2560, "*fp32", False)]
)
def test_the_norm_compiles_for_gpus_that_are_not_here(width, squares, before_gate, unit):
    """And loads 16 bytes at a time."""
    from megatron_ssm_tp.ops.gated_norm_triton import gate_rows, tile_of

    _, tile, warps = tile_of(width)
    types = {f"{name}_ptr": "*bf16" for name in ("y", "z", "weight", "out")} | {"squares_ptr": squares, "eps": "fp32"}
    types |= {f"{name}_stride": "i32" for name in ("y", "z", "out")}
    constants = {"UNIT": unit, "WIDTH": width, "TILE": tile, "BEFORE_GATE": before_gate, "OVERLAPS": True}
    ptx = compile_for_hopper(gate_rows, types, constants, warps, aligned_strides=unit == 1).asm["ptx"]
    assert ".target sm_90" in ptx and ptx.count("ld.global.v4.b32") >= 2  # of y and z


def test_packing_compiles_for_gpus_that_are_not_here():
    from megatron_ssm_tp.ops.gated_norm_triton import pack_rows, unpack_rows

    types = {"product_ptr": "*bf16", "sums_ptr": "*fp32", "packed_ptr": "*bf16", "product_stride": "i32"}
    numbers = dict.fromkeys(("width", "first", "columns"), "i32")
    assert ".target sm_90" in compile_for_hopper(pack_rows, types | numbers, {"TILE": 4096}, 8).asm["ptx"]
    types = {"packed_ptr": "*bf16", "out_ptr": "*bf16", "packed_stride": "i32", "eps": "fp32"}
    constants = {"TILE": 4096, "SUMS": 8}
    assert ".target sm_90" in compile_for_hopper(unpack_rows, types | numbers, constants, 8).asm["ptx"]
