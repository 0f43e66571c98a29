"""Codes and payloads in torch: how far values are off, NaN and Inf in their places, any shape and strides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ssm_tp.comm.codes import decode_blocks, encode_blocks, limits, rounding_bound
from megatron_ssm_tp.comm.payload import Layout
from megatron_ssm_tp.comm.quantize import decode_sum, encode
from megatron_ssm_tp.comm.recipes import Bf16, Float8BlockScaling, Int4BlockScaling, Int8BlockScaling

QUANTIZING = [Int8BlockScaling(16), Float8BlockScaling(16), Int4BlockScaling(16)]
RECIPES = [*QUANTIZING, Bf16(16)]
BIGGEST = torch.finfo(torch.float32).max


def by_name(recipe) -> str:
    return recipe.name


def round_trip(x: torch.Tensor, recipe, parts: int = 1) -> torch.Tensor:
    layout = Layout(recipe, x.numel(), parts)
    return decode_sum(encode(x, layout).unsqueeze(0), layout, torch.full(x.shape, 7.0, dtype=x.dtype))


def in_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    flat = x.detach().flatten().float()
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


# A block's values over all of float32's range, so that most blocks have outliers, with zeros and subnormals among them.
numbers = st.floats(-BIGGEST, BIGGEST, width=32) | st.floats(-2, 2, width=32) | st.sampled_from([0.0, -0.0, BIGGEST])
specials = st.sampled_from([float("nan"), float("inf"), -float("inf")])


def blocks_of(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.lists(values, min_size=16, max_size=16), min_size=1, max_size=3).map(
        lambda rows: torch.tensor(np.array(rows, dtype=np.float32))
    )


@pytest.mark.parametrize("recipe", QUANTIZING, ids=by_name)
@settings(max_examples=150, deadline=None)
@given(values=blocks_of(numbers))
def test_round_trip_is_within_the_bound(recipe, values):
    found = decode_blocks(*encode_blocks(values, recipe.name), recipe.name)
    off, bound = (found.double() - values.double()).abs(), rounding_bound(values, recipe).double()
    assert found.isfinite().all()
    assert (off <= bound).all(), (off - bound).max()
    largest = values.abs().amax(1)
    assert (found.abs().amax(1) <= largest)[largest > 2.0**-110].all()  # so that no dtype's range is left


@pytest.mark.parametrize("recipe", QUANTIZING, ids=by_name)
@settings(max_examples=150, deadline=None)
@given(values=blocks_of(numbers | specials))
def test_nan_and_inf_arrive_in_their_places_and_spare_their_neighbours(recipe, values):
    found = decode_blocks(*encode_blocks(values, recipe.name), recipe.name)
    assert torch.equal(found.isnan(), values.isnan())
    assert torch.equal(found.isposinf(), values.isposinf())
    assert torch.equal(found.isneginf(), values.isneginf())
    finite = values.isfinite()
    off = (found.double() - values.double()).abs()
    assert (off <= rounding_bound(values, recipe).double())[finite].all()


@pytest.mark.parametrize("recipe", QUANTIZING, ids=by_name)
@pytest.mark.parametrize("power", [-115, -60, 60, 125])
def test_values_of_any_magnitude_have_the_same_codes(recipe, power):
    values = torch.randn(4, 16, generator=torch.Generator().manual_seed(3)).clamp(-4, 4)
    (codes, scales), (others, other_scales) = (encode_blocks(values * f, recipe.name) for f in (1.0, 2.0**power))
    assert torch.equal(codes, others) and torch.equal(scales * 2.0**power, other_scales)


@pytest.mark.parametrize("recipe", QUANTIZING, ids=by_name)
def test_the_bound_is_no_wider_than_what_the_recipe_promises(recipe):
    values = torch.linspace(-3, 3, 16).view(1, 16)
    share = {"int8": 1 / 254, "fp8": 1 / 16, "int4": 1 / 14}[recipe.name]
    assert (rounding_bound(values, recipe) <= share * 3 * 1.001).all()
    flagged = torch.cat([values[:, :-1], torch.tensor([[float("inf")]])], dim=1)
    assert rounding_bound(flagged, recipe).max() <= share * 3 * 1.001 * limits(recipe.name)[0] / limits(recipe.name)[1]


@pytest.mark.parametrize("recipe", QUANTIZING, ids=by_name)
def test_every_code_is_used_and_each_is_its_own_value(recipe):
    """The values that codes stand for come back as those codes: no code is lost, and none is taken for another."""
    if recipe.name == "fp8":
        grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        grid = grid[grid.isfinite()]
    else:
        grid = torch.arange(-limits(recipe.name)[0], limits(recipe.name)[0] + 1)
    blocks = torch.cat([torch.full((len(grid), 15), limits(recipe.name)[0]), grid[:, None]], dim=1)
    found = decode_blocks(*encode_blocks(blocks, recipe.name), recipe.name)
    torch.testing.assert_close(found, blocks, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_zero_blocks_are_exact_beside_huge_ones(recipe, dtype):
    x = torch.zeros(3, 16, dtype=dtype)
    x[1] = torch.finfo(dtype).max
    found = round_trip(x, recipe)
    assert torch.equal(found[0], x[0]) and torch.equal(found[2], x[2])
    if dtype == torch.bfloat16 or recipe.name != "bf16":  # others' largest numbers round up to Inf
        assert found[1].isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (16,), (17,), (3, 1, 7), (2, 5, 16), (4, 33)], ids=str)
def test_any_shape_in_any_number_of_parts(recipe, parts, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = round_trip(x, recipe, parts)
    off = in_blocks(found - x, 16).abs()
    assert (off <= rounding_bound(in_blocks(x, 16), recipe)).all()


LAYOUTS = {
    "rows": lambda x: x[:, :, :21],
    "columns": lambda x: x.transpose(0, 2),
    "every-other": lambda x: x[:, :, ::2],
    "rows-of-two-strides": lambda x: x[:, :3, :21],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
@pytest.mark.parametrize("strided", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_matter(recipe, strided):
    x = strided(torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(2)))
    layout = Layout(recipe, x.numel(), 2)
    expected = encode(x.contiguous(), layout)
    assert torch.equal(encode(x, layout)[:, : layout.exact_at], expected[:, : layout.exact_at])
    out = torch.zeros(4, 5, 24)
    if strided is LAYOUTS["rows"]:
        decode_sum(expected.unsqueeze(0), layout, strided(out))
        assert torch.equal(strided(out), round_trip(x.contiguous(), recipe)) and not out[:, :, 21:].any()


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_bytes_on_the_wire(recipe):
    """bytes_of is what a payload holds; padding to 16 bytes a part comes on top."""
    per_block = {"int8": 16 + 4, "fp8": 16 + 4, "int4": 8 + 4, "bf16": 32}[recipe.name]
    for values in (1, 16, 17, 1000):
        blocks = -(-values // 16)
        assert recipe.bytes_of(values) == blocks * per_block
        payload = encode(torch.zeros(values), Layout(recipe, values))
        assert payload.numel() - 16 < recipe.bytes_of(values) <= payload.numel()


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_sums_in_the_order_of_ranks(recipe):
    """1e8 + 1 - 1e8: 0 in this order, 1 in another. (Powers of two: each code is exact but for its scale.)"""
    big, one = torch.full((1, 16), 2.0**27), torch.ones(1, 16)
    layout = Layout(recipe, 16)

    def total(*contributions: torch.Tensor) -> float:
        payloads = torch.stack([encode(x, layout) for x in contributions])
        return decode_sum(payloads, layout, torch.empty(1, 16))[0, 0].item()

    assert total(big, one, -big) == 0
    assert total(big, -big, one) == pytest.approx(1, rel=1e-6)
