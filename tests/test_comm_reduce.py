"""The quantized all-reduce over real ranks: the same bits everywhere, near the exact sum, Megatron's bits when off."""

import comm_jobs as jobs
import numpy as np
import pytest
import torch

from megatron_ssm_tp.comm.codes import bound_of_sum
from megatron_ssm_tp.comm.recipes import Bf16, Float8BlockScaling, Int4BlockScaling, Int8BlockScaling

RECIPES = [Int8BlockScaling(32), Float8BlockScaling(32), Int4BlockScaling(32), Bf16(32)]
ONE, TWO = jobs.ALWAYS_ONE_SHOT, jobs.ALWAYS_TWO_SHOT
WAYS = pytest.mark.parametrize("way", [ONE, TWO], ids=["one-shot", "two-shot"])


def by_name(recipe) -> str:
    return recipe.name


def check(world, p: int, shape, dtype, recipe, way: int, exact_columns: int = 0) -> None:
    """The same bits on all ranks; within the bound of the exact sum; exact columns exact."""
    results = world(p).run(jobs.reduced, shape, dtype, recipe, way, exact_columns)
    for rank, result in enumerate(results):
        assert np.array_equal(result, results[0]), f"rank {rank} has other bits than rank 0"
    columns = shape[-1] if shape else 1
    found = torch.from_numpy(results[0]).view(dtype).view(-1, columns).double()
    contributions = [jobs.contribution(shape, rank, dtype).view(-1, columns) for rank in range(p)]
    kept = columns - exact_columns
    off = (found - sum(x.double() for x in contributions))[:, :kept].abs()
    assert (off <= bound_of_sum([x[:, :kept] for x in contributions], recipe, two_shot=way == TWO)).all()
    assert off.any() or off.numel() < 100  # quantized it was
    if exact_columns:
        expected = sum(x[:, kept:].float() for x in contributions).to(dtype)
        assert torch.equal(found[:, kept:].to(dtype), expected)


@pytest.mark.parametrize("p", [2, 3, 4, 8], ids=lambda p: f"P{p}")
@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
@WAYS
def test_same_bits_on_all_ranks_near_the_exact_sum(world, p, recipe, way):
    check(world, p, (5, 1, 200), torch.bfloat16, recipe, way)


@pytest.mark.parametrize("shape", [(1,), (7,), (31, 33), (2, 3, 64), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@WAYS
def test_any_shape_and_dtype(world, shape, dtype, way):
    for recipe in RECIPES:
        check(world, 3, shape, dtype, recipe, way)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[2], RECIPES[3]], ids=by_name)
def test_exact_columns_are_not_quantized(world, recipe, dtype, way):
    check(world, 3, (5, 2, 70), dtype, recipe, way, exact_columns=6)


@WAYS
@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_nan_and_inf_arrive_as_a_float_sum_has_them(world, recipe, way):
    p = 3
    for found in world(p).run(jobs.specials, recipe, way):
        assert np.isnan(found[1, 3]) and np.isposinf(found[1, 4]) and np.isneginf(found[1, 5]) and np.isnan(found[1, 6])
        rest = np.delete(found.reshape(-1), [43, 44, 45, 46])
        np.testing.assert_allclose(rest, p, rtol=1e-5)


def test_without_a_recipe_below_min_bytes_or_in_float64_it_is_megatrons(world):
    size = 3 * 2 * 33
    cases = [
        (torch.bfloat16, None, True),
        (torch.float32, None, True),
        (torch.float32, Int8BlockScaling(min_bytes=4 * size + 1), True),
        (torch.float32, Int8BlockScaling(min_bytes=4 * size), False),
        (torch.bfloat16, Int8BlockScaling(min_bytes=2 * size + 1), True),
        (torch.bfloat16, Int8BlockScaling(min_bytes=2 * size), False),
        (torch.float64, Int8BlockScaling(), True),
        (torch.bfloat16, Int8BlockScaling(), False),
    ]
    for dtype, recipe, expected in cases:
        assert world(2).run(jobs.off_like_megatron, dtype, recipe) == [expected] * 2, (dtype, recipe)


@pytest.mark.parametrize("recipe", [None, *RECIPES], ids=lambda r: getattr(r, "name", "none"))
def test_backward_is_the_identity(world, recipe):
    for _, given, found in world(2).run(jobs.gradient, recipe):
        assert np.array_equal(given, found)


def test_one_rank_alone_gets_its_tensor_back(world):
    for recipe in (None, Int8BlockScaling()):
        [(out, _, _)] = world(1).run(jobs.gradient, recipe)
        assert np.array_equal(out, jobs.contribution((4, 33), 0, torch.float32).numpy())


def test_what_is_sent(world):
    """Codes and scales and nothing else: one all-gather for two ranks or little data, an exchange and an all-gather
    for much."""
    recipe, little, much = Int8BlockScaling(128), 300, 1 << 20
    names = [[name for name, *_ in sent] for sent in world(2).run(jobs.collectives_sent, much, recipe)]
    assert names == [["_allgather_base"]] * 2
    assert [name for name, *_ in world(3).run(jobs.collectives_sent, little, recipe)[0]] == ["_allgather_base"]
    exchange, gather = world(3).run(jobs.collectives_sent, much, recipe)[0]
    assert exchange[0] == "alltoall_base" and gather[0] == "_allgather_base"
    rows, part_bytes = exchange[1]
    assert rows == 3 and recipe.bytes_of(much) <= 3 * part_bytes <= recipe.bytes_of(much) + 3 * (132 + 16)
    assert [name for name, *_ in world(3).run(jobs.collectives_sent, much, None)[0]] == ["allreduce"]


def test_autocast_concerns_its_group_alone(world):
    """The ranks hold groups (0, 1), (1, 2) and all; rank 2, which is not in the first, restricts nothing."""
    zero, one, two = world(3).run(jobs.autocast_by_group)
    assert zero == ["None/None", "int8/int4", "None/int4", "None/None"]
    assert one == ["None/None/None", "int8/int4/int4", "None/int4/int4", "None/None/None"]
    assert two == ["None/None", "int8/int8", "None/None", "None/None"]


def test_a_group_of_some_ranks(world):
    zero, one, two = world(3).run(jobs.sub_group_sum, (1, 2))
    assert zero is None and np.array_equal(one, two)
    np.testing.assert_allclose(one, 5.0, rtol=1e-5)


@pytest.mark.parametrize(
    "case, said",
    [
        ("dtype", ["dtype=torch.float64", "legal: bfloat16, float16, float32"]),
        ("group", ["group=", "rank belongs to"]),
        ("exact_columns", ["exact_columns=4", "x has 4 columns", "legal: 0 to 3"]),
    ],
)
def test_errors_in_one_line(world, case, said):
    for message in world(2).run(jobs.error_of_all_reduce, case):
        assert "\n" not in message
        for part in said:
            assert part in message
