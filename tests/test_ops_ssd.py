"""Mamba-2's kernels in Triton's interpreter, on the CPU, against the reference; and that they compile for GPUs."""

import re

import pytest
import ssd_jobs as jobs
import torch
from hopper import reads_before_waiting
from hypothesis import given, settings
from hypothesis import strategies as st
from ssd_jobs import SSDCase

pytest.importorskip("triton")
BLOCK = 16
lengths = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 3 * BLOCK + 1)), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
limits = st.sampled_from([(0.0, float("inf")), (0.05, 1.5)])
launches = st.fixed_dictionaries(
    {
        "block": st.sampled_from([BLOCK, 32]),
        "chunk": st.sampled_from([BLOCK, BLOCK + 3, 1000]),
        "channels": st.sampled_from([16, 64]),
    }
)


@settings(max_examples=20, deadline=None)
@given(
    lengths=lengths.filter(lambda found: sum(found) < 60),
    shape=st.sampled_from([(2, 64, 1, 64), (8, 5, 8, 16), (4, 24, 2, 24), (3, 16, 1, 5)]),
    dtype=dtypes,
    limit=limits,
    gap=st.sampled_from([0, 3]),
    backwards=st.booleans(),
    how=launches,
    seed=st.integers(0, 99),
)
def test_packed_prompts_are_scanned_as_by_the_reference(
    interpreted, lengths, shape, dtype, limit, gap, backwards, how, seed
):
    case = SSDCase(tuple(lengths), *shape, dtype, limit=limit, gap=gap, backwards=backwards, seed=seed, how=how)
    assert interpreted(jobs.compare_prefill, case) == ""


@pytest.mark.parametrize(("channels", "d_state"), [(64, 128), (128, 64), (80, 256)])
def test_wide_heads_and_states_at_the_default_launch(interpreted, channels, d_state):
    assert interpreted(jobs.compare_prefill, SSDCase((150, 3, 64), 2, channels, 1, d_state, how={"chunk": 64})) == ""


@pytest.mark.parametrize("rate", [1e-3, 1.0, 1e4])
def test_many_chunks_and_states_that_last_or_are_gone_at_once(interpreted, rate):
    for backwards in (False, True):
        case = SSDCase((49, 2, 33), rate=rate, backwards=backwards, how={"block": BLOCK, "chunk": BLOCK})
        assert interpreted(jobs.compare_prefill, case) == ""


def test_after_a_step_that_forgets_everything_decays_keep_their_digits(interpreted):
    """All but a few: the sums of logarithms that such steps leave are some hundreds, not millions."""
    assert interpreted(jobs.compare_prefill, SSDCase((60,), rate=0.1, shock=1e6, bound=1e-3)) == ""


def test_states_of_16_bits(interpreted):
    case = SSDCase((9, 2), dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    assert interpreted(jobs.compare_prefill, case) == ""


@settings(max_examples=10, deadline=None)
@given(length=st.integers(2, 70), data=st.data())
def test_a_prompt_split_anywhere_gives_the_states_and_outputs_of_the_whole(interpreted, length, data):
    at, chunk = data.draw(st.integers(1, length - 1)), data.draw(st.sampled_from([BLOCK, 1000]))
    case = SSDCase((length,), seed=length, how={"block": BLOCK, "chunk": chunk})
    assert interpreted(jobs.compare_prefill, case, at) == ""


@settings(max_examples=10, deadline=None)
@given(
    requests=st.integers(1, 4),
    shape=st.sampled_from([(2, 64, 1, 64), (8, 5, 8, 16), (4, 130, 2, 128), (3, 16, 1, 5)]),
    dtype=dtypes,
    limit=limits,
    gap=st.sampled_from([0, 3]),
)
def test_steps(interpreted, requests, shape, dtype, limit, gap):
    case = SSDCase((1,) * requests, *shape, dtype, limit=limit, gap=gap)
    assert interpreted(jobs.compare_step, case) == ""


@pytest.mark.parametrize(("rate", "d_state"), [(0.01, 128), (1.0, 64)])
def test_bfloat16_errs_no_more_than_the_formula_with_bfloat16_factors(interpreted, rate, d_state):
    """Seen: 0.9998 to 1.0003 of that formula's error, at rates from 0.001 to 1."""
    case = SSDCase((300,), 4, 64, 2, d_state, torch.bfloat16, rate=rate, how={"chunk": 128})
    for found, formula in interpreted(jobs.errors_in_bfloat16, case):
        assert found <= 1.01 * formula and 0 < formula < 0.01


def test_the_tool_that_checks_gpus_finds_errors_small(interpreted):
    assert max(interpreted(jobs.errors_of_the_tool, torch.float32)) < 1e-6
    found = interpreted(jobs.errors_of_the_tool, torch.bfloat16)
    assert found[:2] == pytest.approx(found[4:], rel=0.01)


@pytest.mark.parametrize(
    ("kernel", "dtype", "channels", "d_state"),
    [
        ("block_decays", "bf16", 64, 128),
        ("chunk_states", "bf16", 64, 128),
        ("chunk_states", "fp32", 64, 256),
        ("scan_chunks", "bf16", 64, 128),
        ("scan_chunks", "bf16", 64, 256),
        ("scan_chunks", "fp32", 16, 16),
        ("ssd_state_step", "bf16", 32, 128),
    ],
)
def test_kernels_compile_for_gpus_that_are_not_here(kernel, dtype, channels, d_state):
    """And fit, and have tensor cores multiply, where they do multiply."""
    compiled = jobs.compiled_for(90, kernel, dtype, channels, d_state)
    ptx = compiled.asm["ptx"]
    assert ".target sm_90" in ptx and compiled.metadata.shared <= 227 << 10
    assert bool(re.search(r"\bw?g?mma\.", ptx)) == (kernel in ("chunk_states", "scan_chunks"))


def test_a_step_reads_states_before_it_waits_only_if_they_are_at_rest():
    for at_rest in (True, False):
        ptx = jobs.compiled_for(90, "ssd_state_step", "bf16", 32, 128, at_rest).asm["ptx"]
        assert reads_before_waiting(ptx) == at_rest


@pytest.mark.parametrize("kernel", ["chunk_states", "scan_chunks"])
@pytest.mark.parametrize(
    ("dtype", "d_state"), [("bf16", 128), ("bf16", 256), ("fp16", 256), ("fp32", 64), ("fp32", 128), ("fp32", 256)]
)
def test_prefill_fits_into_the_least_shared_memory_of_ampere_and_ada(kernel, dtype, d_state):
    assert jobs.compiled_for(86, kernel, dtype, 64, d_state).metadata.shared <= 99 << 10
