"""The symmetric backend's kernels among ranks in Triton's interpreter: the collective backend's bits, on every rank.

The interpreter runs a rank's programs one after the other and each tile as a whole: what depends on the order of memory
accesses, or on programs and warps that run at a time, tools/soak_allreduce.py looks for on GPUs.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import exchange_jobs
import numpy as np
import pytest
import symmetric_jobs as jobs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from symmetric_jobs import Call

from megatron_ssm_tp.comm.recipes import Bf16, Float8BlockScaling, Int4BlockScaling, Int8BlockScaling
from megatron_ssm_tp.comm.tuning import Launch

pytest.importorskip("triton")
RECIPES = [Int8BlockScaling(32), Float8BlockScaling(32), Int4BlockScaling(32), Bf16(32)]
# Tiles of one block and of several, of no power of two; all programs at once and few.
WORDS = [Launch("words", tile=32), Launch("words", tile=96, programs=2)]
ONE_SHOT = [Launch("one-shot", tile=64), Launch("one-shot", tile=96, programs=2)]
SPLIT = [Launch("split", tile=64), Launch("split", tile=96, programs=2, chunk=3)]
TWO_SHOT = [Launch("two-shot", tile=64), Launch("two-shot", tile=32, programs=2, chunk=2)]
WAYS = pytest.mark.parametrize("ways", [WORDS, ONE_SHOT, SPLIT, TWO_SHOT], ids=lambda ways: ways[0].way)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[int], Ranks]]:
    """interpreted(n): n gloo ranks whose Triton interprets, from its first import on."""
    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in pools:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TRITON_INTERPRET", "1")
                pools[size] = Ranks(size)
                pools[size].run(os.getpid)  # started, with this environment
        return pools[size]

    yield get
    for pool in pools.values():
        pool.stop()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def check(interpreted, directory: Path, p: int, calls: list[Call], codes_bytes: int = 1 << 20, **limits) -> None:
    results = interpreted(p).run(jobs.reduced, directory / f"{p}-{codes_bytes}", calls, codes_bytes, **limits)
    for i, call in enumerate(calls):
        for rank in range(p):
            bits, as_collective = results[rank][i]
            assert np.array_equal(bits, results[0][i][0]), f"rank {rank} has other bits than rank 0: {call}"
            assert as_collective, f"rank {rank} has other bits than the collective backend: {call}"


@pytest.mark.parametrize("p", [2, 3, 4], ids=lambda p: f"P{p}")
@WAYS
def test_the_collective_backends_bits_on_all_ranks(interpreted, directory, p, ways):
    if p < 4:
        calls = [Call((3, 1, 70), recipe, how) for recipe in RECIPES for how in (ways if p == 2 else ways[1:])]
    else:  # many ranks are slow on few cores
        calls = [Call((2, 1, 100), RECIPES[0], ways[1])]
    check(interpreted, directory, p, calls)


@WAYS
def test_any_shape_dtype_and_stride(interpreted, directory, ways):
    shapes = [(1,), (7,), (31, 33), (2, 3, 64), ()]
    calls = [Call(shape, RECIPES[0], ways[1], torch.float32) for shape in shapes]
    calls += [Call((5, 2, 70), recipe, ways[0], torch.float16, stride=75) for recipe in RECIPES]
    check(interpreted, directory, 3, calls)


@WAYS
def test_exact_columns_are_not_quantized(interpreted, directory, ways):
    calls = [
        Call((5, 2, 70), recipe, how, dtype, exact_columns=6)
        for recipe, dtype in [(RECIPES[0], torch.float32), (RECIPES[2], torch.bfloat16), (RECIPES[3], torch.bfloat16)]
        for how in ways
    ]
    others = [calls[0]._replace(exact_columns=0), calls[0]._replace(exact_columns=1, stride=80)]
    check(interpreted, directory, 3, [*calls, *others])


@WAYS
def test_what_does_not_fit_is_reduced_in_pieces(interpreted, directory, ways):
    """4 KiB of codes and 12 exact values at a time."""
    calls = [Call((24, 250), RECIPES[0], ways[1]), Call((12, 250), RECIPES[3], ways[1], exact_columns=2)]
    check(interpreted, directory, 3, calls, codes_bytes=4096, exact_values=12)


def test_calls_of_all_kinds_follow_each_other(interpreted, directory):
    """Back to back, the same memory meets words, codes and sums of other sizes; hypothesis picks the order."""
    call = st.builds(
        Call,
        st.tuples(st.integers(2, 4), st.integers(1, 90)),
        st.sampled_from(RECIPES),
        st.sampled_from(WORDS + ONE_SHOT + SPLIT + TWO_SHOT),
        st.sampled_from([torch.bfloat16, torch.float32]),
        st.just(0),
        st.sampled_from([0, 100]),
    )

    @settings(max_examples=4, deadline=None)
    @given(st.lists(call, min_size=3, max_size=6))
    def run(calls):
        check(interpreted, directory, 2, calls)

    run()


def check_in_a_row(interpreted, directory: Path, launches: list[Launch], last_epoch: int | None = None) -> None:
    calls = [Call((4, 32), RECIPES[0], launch) for launch in launches]
    results = interpreted(2).run(jobs.in_a_row, directory, calls, 0.2, last_epoch)
    for (bits, as_collective), (others, its) in zip(*results, strict=True):
        assert as_collective and its and np.array_equal(bits, others)


def test_nobody_writes_over_what_a_late_rank_has_not_read(interpreted, directory):
    """Two-shot writes where one-shot is read, from either half; two-shot after two-shot would not."""
    one, two = ONE_SHOT[0], TWO_SHOT[0]
    check_in_a_row(interpreted, directory / f"2-{1 << 20}", [one, two, two, one, two])


def test_memory_never_written_is_of_no_call_when_the_count_wraps(interpreted, directory):
    check_in_a_row(interpreted, directory / "wrapped", [ONE_SHOT[0]] * 3, last_epoch=-2)


def test_recipes_say_who_reduces_adds_and_norms(interpreted, directory):
    assert interpreted(2).run(jobs.fused_by_recipe, directory / f"2-{1 << 20}", ONE_SHOT[0]) == [""] * 2


@WAYS
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_nan_and_inf_arrive_as_a_float_sum_has_them(interpreted, directory, recipe, ways):
    for found in interpreted(3).run(jobs.specials, directory / f"3-{1 << 20}", recipe, ways[0]):
        assert np.isnan(found[1, 3]) and np.isposinf(found[1, 4]) and np.isneginf(found[1, 5]) and np.isnan(found[1, 6])
        rest = np.delete(found.reshape(-1), [43, 44, 45, 46])
        np.testing.assert_allclose(rest, 3, rtol=1e-5)


@WAYS
@pytest.mark.parametrize("columns", [64, 96], ids=lambda columns: f"h{columns}")
def test_fused_with_residual_and_norm(interpreted, directory, ways, columns):
    """Rows that are a power of two of blocks and rows that are not; the residual stream in bfloat16 and in float32."""
    for p, recipe, how, dtypes in [
        (2, RECIPES[0], ways[0], (torch.bfloat16, torch.bfloat16)),
        (3, RECIPES[1], ways[1], (torch.float32, torch.bfloat16)),
    ]:
        call = Call((5, 1, columns), recipe, how, dtypes[0])
        results = interpreted(p).run(jobs.add_norm, directory / f"{p}-{1 << 20}", call, dtypes[1])
        assert [problem for *_, problem in results] == [""] * p
        for stream, normed, _ in results:
            np.testing.assert_array_equal(stream, results[0][0])
            np.testing.assert_array_equal(normed, results[0][1])


@WAYS
def test_a_lost_peer_ends_the_wait(interpreted, directory, ways):
    for found in interpreted(2).run(jobs.lost_peer, directory / f"lost-{ways[0].way}", RECIPES[0], ways[0])[1:]:
        assert "inline_asm not supported" in found  # on GPUs it is an instruction that ends the process's kernels


@pytest.mark.parametrize("p", [2, 3], ids=lambda p: f"P{p}")
def test_parts_are_added_before_they_are_sent(interpreted, directory, p):
    launches = [WORDS[1], ONE_SHOT[1], SPLIT[1], TWO_SHOT[1]] if p == 2 else [WORDS[0]]
    found = interpreted(p).run(jobs.parts_reduced, directory / f"{p}-{1 << 20}", RECIPES, launches)
    assert found == [[]] * p


def test_parts_are_reduced_by_whom_the_recipe_says(interpreted, directory):
    assert interpreted(2).run(jobs.parts_by_recipe, directory / f"2-{1 << 20}") == [""] * 2


@pytest.mark.parametrize("p", [2, 3], ids=lambda p: f"P{p}")
def test_products_are_summed_as_they_are_made(interpreted, directory, p):
    shapes = [(1, 16, 1), (9, 1024, 2), (40, 300, 1), (3, 2048, 2)]
    assert interpreted(p).run(exchange_jobs.products, directory / f"{p}-{1 << 20}", shapes) == [[]] * p


@pytest.mark.parametrize(("p", "vocabulary"), [(2, 101), (2, 16400), (3, 4)])
def test_the_largest_of_all_ranks_is_found(interpreted, directory, p, vocabulary):
    """With 4 values on three ranks the last has padding alone."""
    found = interpreted(p).run(exchange_jobs.largest, directory / f"{p}-{1 << 20}", vocabulary, vocabulary)
    assert found == [[]] * p
