"""Recipes at Transformer Engine's row-parallel linear, through a stand-in: see te_jobs.py. TE itself was not run."""

import numpy as np
import pytest
import te_jobs

from megatron_ssm_tp import Int8BlockScaling

TP = pytest.mark.parametrize("tp", [2, 4], ids=lambda tp: f"TP{tp}")
BIAS = pytest.mark.parametrize(
    ("bias", "skip_bias_add"), [(True, False), (True, True), (False, False)], ids=["added", "returned", "none"]
)
INT8 = Int8BlockScaling(block_size=16)


def same(a: list, b: list) -> bool:
    return all(x is y is None or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@TP
@BIAS
def test_without_a_recipe_te_reduces(world, tp, bias, skip_bias_add):
    for sites, (before, sent), (after, sent_after) in world(tp).run(te_jobs.swapped, bias, skip_bias_add, None):
        assert sites == ["fc2"] and same(before, after) and sent == sent_after
        assert [name for name, *_ in sent] == ["allreduce"]


@TP
@BIAS
def test_a_recipe_reduces_once_and_adds_the_bias_once(world, tp, bias, skip_bias_add):
    """Codes are gathered, TE's all-reduce is not there; gradients are TE's, to the bit."""
    ranks = world(tp).run(te_jobs.swapped, bias, skip_bias_add, INT8)
    for sites, (before, _), (after, sent) in ranks:
        assert sites == ["fc2"] and [name for name, *_ in sent] == ["_allgather_base"]
        assert np.array_equal(after[0], ranks[0][2][0][0]) and same(before[1:], after[1:])
        assert 0 < np.linalg.norm(after[0] - before[0]) < 0.02 * np.linalg.norm(before[0])
        assert (after[1] is not None) == skip_bias_add


@TP
def test_with_sequence_parallelism_te_reduces(world, tp):
    for _, (before, sent), (after, sent_after) in world(tp).run(te_jobs.swapped, True, False, INT8, True):
        assert same(before, after) and sent == sent_after and "allgather" not in str(sent)


def test_on_one_rank_nothing_is_reduced(world):
    [(sites, (before, _), (after, sent))] = world(1).run(te_jobs.swapped, True, False, INT8)
    assert sites == ["fc2"] and same(before, after) and sent == []


def test_small_tensors_are_not_quantized(world):
    for _, (before, _), (after, sent) in world(2).run(te_jobs.swapped, True, False, Int8BlockScaling(min_bytes=10**6)):
        assert same(before, after) and [name for name, *_ in sent] == ["allreduce"]


def test_a_context_is_followed(world):
    for within, after in world(2).run(te_jobs.in_a_context):
        assert [within[0][0], after[0][0]] == ["_allgather_base", "allreduce"]


def test_state_and_checkpoints_stay_as_they_were(world):
    for found in world(2).run(te_jobs.left_as_they_were):
        assert found == 5 * [True]


def test_experts_and_subclasses_are_left_alone(world):
    assert world(2).run(te_jobs.experts_and_subclasses) == [[], []]
