"""The scan's and the convolution's kernels in Triton's interpreter, on the CPU, against the references."""

import ops_jobs as jobs
import pytest
import torch
from hopper import compile_for_hopper, reads_before_waiting
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops_jobs import Case

from megatron_ssm_tp import UserError

pytest.importorskip("triton")
CHUNK = 8
lengths = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 3 * CHUNK + 1)), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
launches = st.fixed_dictionaries(
    {
        "chunk": st.sampled_from([CHUNK, CHUNK + 3, 1000]),
        "stages": st.sampled_from([1, 3]),
        "polynomial": st.sampled_from([0, 3]),
        "states_polynomial": st.sampled_from([0, 16]),
    }
)
widths = st.integers(2, 5)


@settings(max_examples=25, deadline=None)
@given(
    lengths=lengths.filter(lambda found: sum(found) < 40),
    shape=st.sampled_from([(7, None), (64, None), (66, None), (14, 2), (9, 3)]),
    d_state=st.sampled_from([8, 16, 16, 5]),
    dtype=dtypes,
    gap=st.sampled_from([0, 3]),
    how=launches,
    seed=st.integers(0, 99),
)
@example(  # an output nine times as large as most, of decays by polynomials
    lengths=[1, 2, 24],
    shape=(64, None),
    d_state=5,
    dtype=torch.float32,
    gap=3,
    how={"chunk": 8, "stages": 1, "polynomial": 3, "states_polynomial": 0},
    seed=56,
)
def test_packed_prompts_are_scanned_as_by_the_reference(interpreted, lengths, shape, d_state, dtype, gap, how, seed):
    case = Case(tuple(lengths), shape[0], d_state, shape[1], dtype, gap=gap, slot_gap=gap, how=how, seed=seed)
    assert interpreted(jobs.compare_scan, case) == ""


def test_prompts_of_no_tokens_keep_their_states(interpreted):
    case = Case((0, 9, 0, 3, 0), how={"chunk": 4})
    assert interpreted(jobs.compare_scan, case) == ""
    assert interpreted(jobs.compare_conv, case, 4, True, (4, 16, 1, 1)) == ""


@pytest.mark.parametrize("d_state", [64, 128])
def test_wide_states(interpreted, d_state):
    case = Case((19, 3), 5, d_state, how={"chunk": CHUNK})
    assert interpreted(jobs.compare_scan, case) == ""


@pytest.mark.parametrize("steady", [True, False])
def test_many_chunks_and_states_that_last(interpreted, steady):
    """States that outlive all chunks, and such that are gone before a chunk ends."""
    for backwards in (False, True):
        case = Case((45, 2), 6, steady=steady, backwards=backwards, how={"chunk": CHUNK})
        assert interpreted(jobs.compare_scan, case) == ""


def test_states_of_16_bits(interpreted):
    case = Case((9, 2), 6, dtype=torch.bfloat16, state_dtype=torch.bfloat16, how={"chunk": 1000})
    assert interpreted(jobs.compare_scan, case) == ""


def test_more_sequences_than_are_looked_at_at_once(interpreted):
    assert interpreted(jobs.compare_scan_by_eights, Case((1,) * 8 + (2,) * 9, 2, 2, how={"chunk": CHUNK})) == ""


@settings(max_examples=10, deadline=None)
@given(length=st.integers(2, 25), data=st.data())
def test_a_prompt_split_anywhere_gives_the_states_and_outputs_of_the_whole(interpreted, length, data):
    at = data.draw(st.integers(1, length - 1))
    case = Case((length,), 7, seed=length, how={"chunk": data.draw(st.sampled_from([CHUNK, 1000]))})
    assert interpreted(jobs.compare_split_scan, case, at) == ""
    assert interpreted(jobs.compare_split_conv, case, data.draw(widths), at) == ""


@settings(max_examples=15, deadline=None)
@given(
    requests=st.integers(1, 4),
    shape=st.sampled_from([(7, None), (130, None), (14, 2)]),
    d_state=st.sampled_from([5, 8, 16, 64]),
    dtype=dtypes,
    gap=st.sampled_from([0, 3]),
)
def test_steps(interpreted, requests, shape, d_state, dtype, gap):
    case = Case((1,) * requests, shape[0], d_state, shape[1], dtype, gap=gap, slot_gap=gap)
    assert interpreted(jobs.compare_step, case) == ""


def test_steps_without_a_slot_write_no_state(interpreted):
    assert interpreted(jobs.touched_by_padding, Case((1, 1), 7), 4) is False


@settings(max_examples=30, deadline=None)
@given(
    lengths=lengths,
    channels=st.sampled_from([1, 7, 32, 33]),
    width=widths,
    bias=st.booleans(),
    dtype=dtypes,
    gap=st.sampled_from([0, 3]),
    backwards=st.booleans(),
    tokens=st.sampled_from([4, CHUNK]),
    group=st.sampled_from([1, 3, CHUNK]),
)
def test_packed_prompts_are_convolved_as_by_the_reference(
    interpreted, lengths, channels, width, bias, dtype, gap, backwards, tokens, group
):
    case = Case(tuple(lengths), channels, dtype=dtype, gap=gap, slot_gap=gap, backwards=backwards, seed=sum(lengths))
    assert interpreted(jobs.compare_conv, case, width, bias, (tokens, 16, 1, group)) == ""
    steps = Case((1,) * len(lengths), channels, dtype=dtype, state_dtype=dtype, gap=gap, slot_gap=gap)
    assert interpreted(jobs.compare_conv_step, steps, width, bias) == ""


@pytest.mark.parametrize("one_each", [True, False])
@pytest.mark.parametrize("states_only", [True, False])
def test_the_scan_compiles_for_gpus_that_are_not_here(states_only, one_each):
    from megatron_ssm_tp.ops.selective_scan_triton import scan_chunks

    narrow = ("x_ptr", "dt_ptr", "z_ptr", "out_ptr", "D_ptr", "dt_bias_ptr")
    constants = {"N": 16, "LANES": 32, "STAGES": 3, "POLYNOMIAL": 2, "MASKED": False, "ONE_EACH": one_each}
    ptx = compile_for_hopper(
        scan_chunks, _types(scan_chunks, narrow, constants), constants | {"STATES_ONLY": states_only}, 1
    ).asm["ptx"]
    assert ".target sm_90" in ptx and "cp.async" in ptx


@pytest.mark.parametrize("at_rest", [True, False], ids=["at rest", "just written"])
@pytest.mark.parametrize("op", ["scan", "convolution"])
def test_a_step_reads_states_before_it_waits_only_if_they_are_at_rest(op, at_rest):
    from megatron_ssm_tp.ops.conv1d_triton import conv1d_step
    from megatron_ssm_tp.ops.state_step_triton import state_step

    kernel = state_step if op == "scan" else conv1d_step
    constants = {"CHANNELS": 128, "AT_REST": at_rest, "OVERLAPS": True} | ({"N": 16} if op == "scan" else {"WIDTH": 4})
    narrow = ("x_ptr", "dt_ptr", "z_ptr", "out_ptr", "weight_ptr", "bias_ptr", "B_ptr", "C_ptr", "D_ptr", "dt_bias_ptr")
    ptx = compile_for_hopper(kernel, _types(kernel, narrow, constants), constants, 4).asm["ptx"]
    assert ".target sm_90" in ptx and reads_before_waiting(ptx) == at_rest


def _types(kernel, narrow: tuple[str, ...], constants: dict) -> dict[str, str]:
    """Of a kernel's arguments: pointers named in `narrow` are to bfloat16, others to float32 or numbers of slots."""
    types = {name: "i32" for name in kernel.arg_names if name not in constants}
    types |= {name: "*bf16" if name in narrow else "*fp32" for name in types if name.endswith("_ptr")}
    return types | {"slots_ptr": "*i64"} | ({"cu_seqlens_ptr": "*i32"} if "cu_seqlens_ptr" in types else {})


@pytest.mark.parametrize("unit", [1, 8], ids=["rows of 16n", "rows of 8n"])
@pytest.mark.parametrize("channels", [512, 500], ids=["whole", "masked"])
def test_the_convolution_compiles_for_gpus_that_are_not_here(channels, unit):
    """And loads the channels of a lane as one word."""
    from megatron_ssm_tp.ops.conv1d import WIDE
    from megatron_ssm_tp.ops.conv1d_triton import conv1d_chunks

    tokens, block, warps, group = WIDE
    types = {name: "*bf16" for name in conv1d_chunks.arg_names if name.endswith("_ptr")}
    types |= {"slots_ptr": "*i64", "cu_seqlens_ptr": "*i32", "sequences": "i32", "channels": "i32"}
    types |= {"x_stride": "i32", "state_stride": "i32"}
    constants = {"WIDTH": 4, "TOKENS": tokens, "CHANNELS": block, "GROUP": group, "MASKED": channels % block != 0}
    constants["UNIT"] = unit
    ptx = compile_for_hopper(conv1d_chunks, types, constants, warps, aligned_strides=unit == 1).asm["ptx"]
    assert ".target sm_90" in ptx and (channels != block or ptx.count("ld.global.v2.b32") >= 2 * group)


def test_a_chunk_holds_the_tokens_before_the_next():
    from megatron_ssm_tp.ops.conv1d import causal_conv1d_varlen

    x, where = torch.zeros(3, 2), (torch.zeros(1, dtype=torch.int32), torch.tensor([0, 3]))
    with pytest.raises(UserError, match=r"tile=.* has too few tokens before those of 4 taps"):
        causal_conv1d_varlen(x, torch.zeros(2, 4), None, torch.zeros(1, 2, 4), *where, (2, 16, 1, 1))


def test_biases_slots_and_bounds_may_be_columns(interpreted):
    assert interpreted(jobs.strided_arguments) == ""


def test_heads_that_do_not_divide_are_refused():
    from megatron_ssm_tp.ops.selective_scan import ScanShape
    from megatron_ssm_tp.ops.ssd import _Shape

    with pytest.raises(UserError, match=r"2 heads'?: do not divide 7 channels"):
        ScanShape(5, 1, 7, 2, 16)
    with pytest.raises(UserError, match=r"2 groups'?: do not divide 5 heads"):
        _Shape(9, 5, 4, 2, 16, 1)
