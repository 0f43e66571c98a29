"""argmax_rows and embedding_rows: by torch, and by kernels in Triton's interpreter."""

import pytest
import torch
import vocabulary_jobs as jobs
from hopper import compile_for_hopper

from megatron_ssm_tp.ops.argmax import argmax_rows
from megatron_ssm_tp.ops.embedding import embedding_rows


@pytest.mark.parametrize(("rows", "columns", "most"), [(1, 5, 2), (3, 16384, 10**6), (2, 40000, 3), (2, 16385, 1)])
def test_the_first_of_the_largest_is_found(interpreted, rows, columns, most):
    pytest.importorskip("triton")
    assert interpreted(jobs.argmax, rows, columns, most)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_that_lie_elsewhere_are_zeros(interpreted, dtype):
    pytest.importorskip("triton")
    for first, columns in ((0, 3), (5, 1030), (100, 64)):
        assert interpreted(jobs.embedding, first, [0, 3, 11, 5, 106, -1, 12, 99], columns, dtype)


def test_the_cpu_has_torchs():
    x, weight = torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]]), torch.arange(6.0).view(3, 2)
    assert argmax_rows(x).tolist() == [1, 0]
    assert embedding_rows(torch.tensor([4, 6, 7, 3]), weight, 4, torch.float32).tolist() == [
        [0, 1],
        [4, 5],
        [0, 0],
        [0, 0],
    ]


def test_they_compile_for_hopper():
    pytest.importorskip("triton")
    from megatron_ssm_tp.ops.argmax_triton import BLOCK, WARPS, argmax_row
    from megatron_ssm_tp.ops.embedding_triton import copy_rows

    types = {"x_ptr": "*bf16", "out_ptr": "*i64", "x_stride": "i32", "columns": "i32"}
    ptx = compile_for_hopper(argmax_row, types, {"BLOCK": BLOCK, "OVERLAPS": True}, WARPS).asm["ptx"]
    assert ".local" not in ptx and "griddepcontrol.wait" in ptx
    types = {"token_ids_ptr": "*i64", "weight_ptr": "*bf16", "out_ptr": "*fp32", "first": "i32", "rows": "i32"}
    made = compile_for_hopper(copy_rows, types, {"COLUMNS": 4096, "BLOCK": 1024, "OVERLAPS": True}, 4)
    assert "griddepcontrol.wait" in made.asm["ptx"]
