"""The Triton codecs in Triton's interpreter, on the CPU: the bits of the reference."""

import comm_jobs as jobs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ssm_tp.comm.payload import Layout
from megatron_ssm_tp.comm.recipes import Float8BlockScaling, Int4BlockScaling, Int8BlockScaling

pytest.importorskip("triton")
RECIPES = pytest.mark.parametrize(
    "recipe", [Int8BlockScaling(16), Float8BlockScaling(16), Int4BlockScaling(16)], ids=lambda r: r.name
)


bits = st.integers(0, 2**32 - 1).map(lambda n: np.uint32(n).view(np.float32).item())  # NaN and Inf among them
numbers = bits | st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, float("nan"), float("inf"), -float("inf")])


@RECIPES
@settings(max_examples=40, deadline=None)
@given(values=st.lists(numbers, min_size=1, max_size=70), parts=st.integers(1, 3))
def test_any_float32_is_encoded_to_the_references_bytes(interpreted, recipe, values, parts):
    assert interpreted(jobs.compare_encoding, np.array(values, dtype=np.float32), recipe, parts) == ""


@RECIPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_half_way_case_is_rounded_alike(interpreted, recipe, dtype):
    """Blocks whose scale is near 1, so that their values lie at codes and half way between."""
    limit = {"int8": 127, "fp8": 448, "int4": 7}[recipe.name]
    grid = torch.cat(
        [torch.arange(-limit, limit, 0.5), 2.0 ** torch.arange(-14, 8.0), 3 * 2.0 ** torch.arange(-12, 6.0)]
    )
    grid = torch.nn.functional.pad(grid[grid.abs() <= limit], (0, -len(grid) % 15))
    grid = grid[: len(grid) // 15 * 15].view(-1, 15)
    for largest in (limit, limit * (1 + 2.0**-22), limit * (1 - 2.0**-23)):
        blocks = torch.nn.functional.pad(grid, (0, 1), value=largest).to(dtype)
        assert interpreted(jobs.compare_encoding, blocks, recipe, 2) == ""


@RECIPES
@pytest.mark.parametrize("block_size", [16, 128, 1024])
def test_block_sizes_shapes_and_strides(interpreted, recipe, block_size):
    recipe = type(recipe)(block_size)
    x = torch.randn(3, 5, 700, generator=torch.Generator().manual_seed(4))
    for view in (x, x[:, :, :333], x[0, :, :333], x.transpose(1, 2), x[..., ::2], x[0, 0, 0]):
        assert interpreted(jobs.compare_encoding, view, recipe, 3) == ""


def payloads_of(layout: Layout, ranks: int, seed: int) -> np.ndarray:
    """Random bytes as codes, and as scales random numbers of either sign."""
    generator = np.random.default_rng(seed)
    payloads = generator.integers(0, 256, (ranks, layout.parts, layout.part_bytes), dtype=np.uint8)
    signs = generator.choice([-1, 1, 1], (ranks, layout.parts, layout.blocks))
    scales = (signs * 2.0 ** generator.uniform(-126, 100, signs.shape)).astype(np.float32)
    payloads[:, :, layout.scales_at : layout.exact_at] = scales.view(np.uint8)
    if layout.recipe.name == "fp8":  # no encoder gives NaN's code to a block with a positive scale
        codes = payloads[:, :, : layout.scales_at].reshape(*signs.shape, -1)
        codes = np.where((signs[..., None] > 0) & (codes & 0x7F == 0x7F), np.uint8(0x7E), codes)
        payloads[:, :, : layout.scales_at] = codes.reshape(ranks, layout.parts, -1)
    return payloads


@RECIPES
@settings(max_examples=25, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 4), parts=st.integers(1, 3), columns=st.integers(1, 40))
def test_any_bytes_are_decoded_and_summed_to_the_references_values(interpreted, recipe, data, ranks, parts, columns):
    layout = Layout(recipe, 3 * columns, parts)
    payloads = payloads_of(layout, ranks, data.draw(st.integers(0, 2**32)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    row_stride = data.draw(st.sampled_from([None, columns + 3]))
    assert interpreted(jobs.compare_decoding, payloads, layout, (3, columns), dtype, row_stride) == ""
