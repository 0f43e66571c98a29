"""Ranks that make calls of their own: what differs is refused on all by one line, what says the same is not."""

import agreement_jobs as jobs
import numpy as np
import pytest

from megatron_ssm_tp import Bursts, CacheLimits


@pytest.mark.parametrize(
    ("field", "here", "there"),
    [
        ("limits", CacheLimits(max_tokens=64), CacheLimits(max_tokens=2048)),
        ("bursts", None, Bursts(longest=2)),
        ("seed", 0, 1),
        ("dtype", "float32", "bfloat16"),
        ("engine", "slots", "megatron"),
    ],
)
def test_ranks_that_load_by_other_arguments(world, tiny, field, here, there):
    expected = f"{field}='that of rank 1': differs from rank 0's; legal: the same on all ranks"
    given = [{field: here}, {field: there}]
    assert world(2).run(jobs.error_of_loading, tiny("mamba").path, given, timeout=30) == [expected] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_seed_that_one_rank_cannot_take(world, tiny, rank):
    given = [{"seed": -1 if number == rank else 0} for number in range(2)]
    expected = "seed=-1: is out of range; legal: an integer from 0 to 2^63 - 1"
    assert world(2).run(jobs.error_of_loading, tiny("mamba").path, given, timeout=30) == [expected] * 2


@pytest.mark.parametrize("befores", [[[5, 6], [7, 8]], [[5, 6], None], [None, [5, 6]]], ids=str)
def test_ranks_that_go_on_with_other_states(world, tiny, befores):
    expected = "states='that of rank 1': differs from rank 0's; legal: the same on all ranks"
    assert world(2).run(jobs.error_of_states, tiny("mamba").path, befores, timeout=30) == [expected] * 2


@pytest.mark.parametrize(
    "other", [{"min_p": 0.1, "seed": 5}, {"seed": np.int64(5), "min_p": 0.1}], ids=["another order", "numpy's integer"]
)
def test_the_same_parameters_said_in_another_way(world, tiny, other):
    path, given = tiny("mamba", tied=False).path, {"seed": 5, "min_p": 0.1}
    alike = world(2).run(jobs.sampled_by, path, [given, given])
    for each in ([given, other], [other, other]):
        assert world(2).run(jobs.sampled_by, path, each) == alike
    assert world(2).run(jobs.sampled_by, path, [given | {"seed": 6}] * 2) != alike


@pytest.mark.parametrize("without", [0, 1])
def test_a_state_that_one_rank_does_not_hand_in(world, tiny, tmp_path, without):
    expected = "state='NoneType': is no state; legal: that of an answer, of return_states=True"
    path, folder = tiny("mamba").path, tmp_path / "state"
    assert world(2).run(jobs.error_of_saving, path, folder, without, timeout=30) == [expected] * 2
    assert not list(tmp_path.glob("*/*"))
