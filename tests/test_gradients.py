"""Training's kernels in Triton's interpreter, on the CPU: outputs and gradients against the references in float64."""

import sys
from pathlib import Path

import grad_jobs as jobs
import pytest
import torch
from grad_jobs import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ssm_tp.ops import reference

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import check_gradients

pytest.importorskip("triton")
SMALL = {"chunk": 4, "sub": 2, "tile": 64}
ONES = dict.fromkeys(("length", "chunks", "batch", "heads", "head_blocks", "groups", "group_blocks"), 1)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
outputs = st.sampled_from([("y",), ("y", "final"), ("final",)])


@settings(max_examples=7, deadline=None)
@given(
    batch=st.sampled_from([1, 1, 2]),
    length=st.integers(1, 9),
    shape=st.sampled_from([(7, None), (5, None), (9, 3)]),
    d_state=st.sampled_from([8, 16, 5]),
    dtype=dtypes,
    flags=st.fixed_dictionaries(dict.fromkeys(("initial", "steady", "backwards", "time_first"), st.booleans())),
    gap=st.sampled_from([0, 3]),
    outputs=outputs,
    how=st.sampled_from(
        [SMALL | {"tile": 128}, SMALL, SMALL | {"group_blocks": 1}, {"chunk": 8, "sub": 8, "tile": 64}]
    ),
)
def test_scans_and_their_gradients(interpreted, batch, length, shape, d_state, dtype, flags, gap, outputs, how):
    case = Case(
        batch, length, shape[0], d_state, shape[1], dtype, gap=gap, outputs=outputs, seed=length, how=how, **flags
    )
    assert interpreted(jobs.compare_scan, case) == ""


@pytest.mark.parametrize("d_state", [64, 128])
def test_wide_states(interpreted, d_state):
    assert interpreted(jobs.compare_scan, Case(1, 5, 3, d_state, how=SMALL | {"tile": 2 * d_state})) == ""


@pytest.mark.parametrize("steady", [True, False])
def test_many_chunks_and_states_that_last(interpreted, steady):
    """States that outlive all chunks, and such that are gone before a chunk ends."""
    case = Case(1, 21, 4, 8, steady=steady, initial=True, how=SMALL)
    assert interpreted(jobs.compare_scan, case) == ""


def test_the_same_bits_in_any_order_and_only_what_is_asked_for(interpreted):
    case = Case(2, 6, 6, 8, 2, torch.bfloat16, outputs=("y",), how=SMALL)
    assert interpreted(jobs.compare_when_run_again, case) == ""


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    channels=st.sampled_from([1, 7, 33]),
    width=st.integers(2, 4),
    bias=st.booleans(),
    dtype=dtypes,
    flags=st.fixed_dictionaries(dict.fromkeys(("initial", "backwards", "time_first"), st.booleans())),
    gap=st.sampled_from([0, 3]),
    outputs=outputs,
    tiles=st.sampled_from([1, 2]),
)
def test_convolutions_and_their_gradients(
    interpreted, batch, length, channels, width, bias, dtype, flags, gap, outputs, tiles
):
    if dtype != torch.float32:
        outputs = ("y",)  # autograd adds what comes by the last inputs to x's gradient in x's dtype
    how = {"tokens": 4, "channels": 16, "back_tokens": 4, "back_channels": 16, "tiles": tiles}
    case = Case(batch, length, channels, dtype=dtype, gap=gap, outputs=outputs, seed=length, how=how, **flags)
    assert interpreted(jobs.compare_conv, case, width, bias) == ""


@pytest.mark.parametrize(
    ("slots", "blocks", "programs", "expected"),
    [
        (128, 128, 1584, 11),  # 12 groups: 1536 programs, each once
        (256, 128, 1584, 22),
        (15840, 4, 1584, 4),  # chunks alone are enough
        (1, 128, 1584, 1),
    ],
)
def test_groups_are_such_that_programs_end_together(slots, blocks, programs, expected):
    from megatron_ssm_tp.ops.selective_scan_grad import group_blocks_for

    assert group_blocks_for(slots, blocks, programs) == expected


@pytest.mark.parametrize(
    ("module", "kernel", "constants"),
    [
        ("selective_scan_back_triton", "backward_chunks", {"CHUNK": 16, "SUB": 4, "N": 16, "CHANNELS": 32}),
        ("selective_scan_back_triton", "backward_chunks", {"CHUNK": 8, "SUB": 8, "N": 8, "CHANNELS": 4} | ONES),
        ("selective_scan_carry_triton", "carry_chunks", {"CHUNK": 16, "N": 16, "CHANNELS": 32}),
        ("selective_scan_grad_triton", "join_chunks", {"REVERSE": True, "BLOCK": 32, "first_ptr": None}),
        ("conv1d_grad_triton", "conv1d_back", {"WIDTH": 4, "TOKENS": 4, "CHANNELS": 32, "TILES": 2, "bias_ptr": None}),
    ],
)
def test_kernels_compile_for_gpus_that_are_not_here(module, kernel, constants):
    assert ".target sm_90" in jobs.compile_for_hopper(module, kernel, constants)


def test_cases_on_gpus():
    """Of the dtypes, lengths and slopes that are promised, none is lost."""
    assert check_gradients.LIMITS[torch.float16] <= check_gradients.LIMITS[torch.bfloat16]
    cases = [case for case in check_gradients.CASES.values() if case.d_state == 16]  # of all dtypes
    assert any(case.initial for case in cases) and any((case.length, case.channels) == (4096, 256) for case in cases)


@pytest.mark.parametrize("dtype", check_gradients.LIMITS, ids=str)
@pytest.mark.parametrize("fault", [None, "dx", "dinitial"])
def test_a_wrong_gradient_is_seen_on_gpus(monkeypatch, capsys, fault, dtype):
    """That of the states before too; the last states have a slope."""
    sound = check_gradients.outputs_and_gradients

    def found(operator, given, slopes):
        assert slopes.keys() == {"y", "final"}
        tensors = sound(operator, given, slopes)
        return tensors | ({fault: tensors[fault] * 1.01} if fault else {})

    case = Case(2, 40, 16, initial=True, dtype=dtype)
    monkeypatch.setattr(check_gradients, "outputs_and_gradients", found)
    for name, inputs, width in (("scan", jobs.scan_inputs(case), 16), ("conv", jobs.conv_inputs(case, 4, True), 4)):
        operator = {"scan": reference.selective_scan, "conv": reference.causal_conv1d}[name]
        good = check_gradients.compare(name, case, {"truth": operator, "ours": operator}, inputs, width)
        assert good == (fault is None)
    assert "dinitial" in capsys.readouterr().out
