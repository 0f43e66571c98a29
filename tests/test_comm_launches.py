"""What the symmetric backend does on the host: who gets buffers, which launch, and that kernels compile for GPUs."""

import launch_jobs as jobs
import pytest
import torch

from megatron_ssm_tp.comm import symmetric
from megatron_ssm_tp.comm.recipes import Bf16, Float8BlockScaling, Int4BlockScaling, Int8BlockScaling
from megatron_ssm_tp.comm.tuning import guess, launch_for, table

RECIPES = [Int8BlockScaling(), Float8BlockScaling(), Int4BlockScaling(), Bf16()]


def test_every_size_has_a_launch():
    for ranks in (2, 3, 4, 8):
        for recipe in RECIPES:
            for fused in (False, True):
                for values in (1, 4096, 1 << 18, 1 << 20, 1 << 25, 1 << 28):
                    launch = launch_for(ranks, recipe, values, fused)
                    assert launch.way in ("words", "one-shot", "split", "two-shot") and launch.warps in (1, 2, 4, 8, 16)


def test_the_table_is_by_size_and_measured_conditions_are_with_it():
    rows = [row for row in table() if (row.ranks, row.recipe, row.fused) == (2, "int8", False)]
    assert [row.values for row in rows] == sorted({row.values for row in rows}) and len(rows) > 1
    recipe = Int8BlockScaling()
    assert launch_for(2, recipe, rows[0].values) == rows[0].launch
    assert launch_for(2, recipe, rows[0].values + 1) == rows[1].launch
    assert launch_for(2, recipe, 100 * rows[-1].values) == rows[-1].launch


def test_what_was_not_measured_is_guessed_by_bytes():
    assert guess(4, Int8BlockScaling(), 4096).way == "words"
    assert guess(2, Bf16(), 1 << 26).way == "split" and guess(4, Bf16(), 1 << 26).way == "two-shot"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no memory", "a rank cannot have the buffers: out of memory"),
        ("no triton", "a rank has no triton"),
        ("two hosts", "its ranks are on several nodes"),
        ("no peer access", "its GPUs cannot share memory: no peer access"),
        ("one rank's peer access", "its GPUs cannot share memory: no peer access"),
    ],
)
def test_what_fails_on_one_rank_is_known_to_all(world, case, said):
    """And the next call does not ask again."""
    for rank, found in enumerate(world(2).run(jobs.reasons_without_buffers, case)):
        assert found == [said, said], rank


def test_backends_refuse_the_same(world):
    for found in world(2).run(jobs.illegal_columns):
        assert len(set(found)) == 1 and found[0].startswith("exact_columns=5: x has 4 columns")


def test_capture_needs_buffers(world):
    for ok, reason in world(2).run(jobs.supported_under_capture):
        assert not ok and "none can be allocated under capture" in reason


def test_a_fallback_on_gpus_is_said_by_one_rank(world):
    first, second = world(2).run(jobs.warnings_of_a_fallback)
    assert first == ["all-reduces are quantized by the backend 'collective': no peer access"] and second == []


def test_the_fused_reduction_has_no_backward(world):
    for said in world(2).run(jobs.fused_errors):
        assert [line.split(":")[0] for line in said] == ["requires_grad=True", "residual=(2, 3)", "weight=(3,)"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_what_is_dearer_fused_is_fused_while_it_is_small(recipe):
    def fits(rows: int, columns: int, residual: torch.dtype = torch.float32) -> bool:
        return symmetric.fits(torch.empty(rows, 1, columns, device="meta"), residual, recipe)

    quantizes = recipe.name != "bf16"
    assert fits(1562, 2560) and fits(1563, 2560) != quantizes  # a tile of 4096; 4 million values
    assert fits(1 << 15, 4096) == fits(1 << 15, 3328) == (recipe.name != "int4")  # a tile of 1.23 times the row
    assert fits(976, 4096, torch.float64) and fits(977, 4096, torch.float64) != quantizes  # wider than x
    assert fits(976, 4096) and fits(977, 4096) == (recipe.name != "int4")
    assert not fits(1, 2561) and not fits(1, 16384 + 128) and not fits(1, 0)


KERNELS = [
    ("one_shot", {"flagged": False, "tile_blocks": 2, "blocks": 2, "threads": 64}, {}),
    ("one_shot", {"flagged": False, "add_norm": True, "tile_blocks": 64, "blocks": 64}, {}),  # warps hold copies
    ("one_shot", {"flagged": False, "exact": True, "contiguous": False, "ragged": True}, {}),
    ("one_shot", {"split": True}, {}),
    ("one_shot", {"flagged": False, "add_norm": True, "parts": 4, "tile_blocks": 32, "blocks": 32}, {}),
    ("one_shot", {"split": True, "add_norm": True, "tile_blocks": 20, "blocks": 32}, {}),
    ("one_shot", {}, {"all_blocks": 1, "chunk": 1}),
    ("two_shot", {"ranks": 8, "rank": 7}, {}),
]


@pytest.mark.parametrize(("kernel", "shape", "ones"), KERNELS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES[:1] + RECIPES[3:], ids=lambda recipe: recipe.name)
def test_kernels_compile_for_gpus_that_are_not_here(kernel, shape, ones, recipe):
    """For sm_90, with the compiler that Triton brings along; arguments of 1 are constants to it."""
    pytest.importorskip("triton")
    compiled = jobs.compile_for_hopper(kernel, {"format": recipe.name} | shape, ones)
    assert ".target sm_90" in compiled.asm["ptx"] and "trap" in compiled.asm["ptx"]


def test_no_integers_are_added_in_pairs():
    """ptxas (of CUDA 12.8) loses the constant of a packed 16-bit addition if it needs one half alone: met with int4, of
    one block, in words."""
    pytest.importorskip("triton")
    shape = {"format": "int4", "block_size": 32, "flagged": False, "tile_blocks": 8, "blocks": 8, "threads": 64}
    constants = {"all_blocks": 1, "tile_programs": 1, "chunk": 1}
    compiled = jobs.compile_for_hopper("one_shot", shape | {"contiguous": False, "ragged": True}, constants)
    assert "16x2" not in compiled.asm["ptx"]


def test_what_is_made_and_exchanged_at_once_compiles_for_hopper():
    pytest.importorskip("triton")
    for asm in jobs.exchanges_for_hopper():
        assert ".local" not in asm["ptx"] and "trap" in asm["ptx"] and "griddepcontrol.wait" in asm["ptx"]


def test_what_is_exchanged_exactly_goes_by_the_kernels_that_a_recipe_asks_for(world):
    """Of any format; not by other backends, of few bytes, or of other dtypes."""
    recipes = [None, Bf16(), Int8BlockScaling(), Int8BlockScaling(backend="collective"), Int8BlockScaling(min_bytes=17)]
    for found in world(2).run(jobs.words_shared, recipes):
        assert found == [False, True, True, False, False, False]
