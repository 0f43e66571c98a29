"""Recipes, allreduce_autocast, and what the package exports of them: no ranks needed."""

import asyncio
import sys
import threading
from dataclasses import FrozenInstanceError

import pytest
import torch

import megatron_ssm_tp
from megatron_ssm_tp import UserError
from megatron_ssm_tp.comm import quantize
from megatron_ssm_tp.comm.autocast import allreduce_autocast, recipe_of
from megatron_ssm_tp.comm.recipe_book import RecipeBook
from megatron_ssm_tp.comm.recipes import (
    RECIPE_NAMES,
    AllReduceRecipe,
    Bf16,
    Float8BlockScaling,
    Int4BlockScaling,
    Int8BlockScaling,
    recipe_by_name,
)

OUT, X = "decoder.layers.3.mixer.out_proj", "decoder.layers.3.mixer.x_proj"
INT8, INT4, FP8 = Int8BlockScaling(), Int4BlockScaling(), Float8BlockScaling()


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message and "legal: " in message
    for part in parts:
        assert part in message, message


def test_recipes_are_found_by_name_and_frozen():
    kinds = [type(recipe_by_name(name)) for name in RECIPE_NAMES]
    assert kinds == [type(None), Bf16, Int8BlockScaling, Float8BlockScaling, Int4BlockScaling]
    assert recipe_by_name("int8", block_size=64, min_bytes=10) == Int8BlockScaling(64, 10)
    assert recipe_by_name("none", block_size=64) is None
    with pytest.raises(FrozenInstanceError):
        INT8.block_size = 3
    with pytest.raises(TypeError):
        AllReduceRecipe()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Int8BlockScaling(block_size=100), ("block_size=100", "16, 32, 64, 128")),
        (lambda: Int8BlockScaling(block_size=True), ("block_size=True",)),
        (lambda: Int4BlockScaling(block_size=128.0), ("block_size=128.0",)),
        (lambda: Bf16(min_bytes=-1), ("min_bytes=-1", "integers from 0")),
        (lambda: Float8BlockScaling(backend="nccl"), ("backend='nccl'", "auto, symmetric, collective")),
        (lambda: recipe_by_name("int3"), ("recipe='int3'", "none, bf16, int8, fp8, int4")),
        (lambda: recipe_by_name("int8", blocksize=2), ("blocksize", "block_size, min_bytes, backend")),
        (lambda: recipe_by_name("none", blocksize=2), ("blocksize",)),
    ],
)
def test_what_is_not_legal_is_said_in_one_line(make, said):
    with pytest.raises(UserError) as error:
        make()
    one_line(error, *said)


def test_supports_says_why_not():
    ok, reason = INT8.supports(torch.float64, None)
    assert not ok and "float64" in reason and "bfloat16, float16, float32" in reason
    ok, reason = INT8.supports(torch.bfloat16, -100)  # torch's group of ranks that are not in it
    assert not ok and "-100" in reason


def test_autocast_decides_within_and_restores():
    book = RecipeBook.everywhere(INT4)
    assert recipe_of(OUT, None) is None and recipe_of(OUT, None, book) == INT4
    with allreduce_autocast(recipe=FP8):
        assert recipe_of(OUT, None) == recipe_of(OUT, None, book) == FP8
        assert recipe_of(X, None) is None
        with allreduce_autocast(enabled=False):
            assert recipe_of(OUT, None, book) is None
        with pytest.raises(KeyError), allreduce_autocast(recipe=INT4):
            assert recipe_of(OUT, None) == INT4
            raise KeyError
        assert recipe_of(OUT, None) == FP8
        with allreduce_autocast():
            assert recipe_of(OUT, None) == INT8
        with allreduce_autocast(recipe=RecipeBook.everywhere(Int8BlockScaling(64))):
            assert recipe_of(OUT, None) == Int8BlockScaling(64)
    assert recipe_of(OUT, None) is None


def test_autocast_is_a_decorator_too():
    @allreduce_autocast(recipe=FP8)
    def found():
        return recipe_of(OUT, None)

    assert [found(), found()] == [FP8, FP8] and recipe_of(OUT, None) is None


def test_threads_and_tasks_do_not_see_each_others_autocast():
    seen = []

    def look() -> None:
        seen.append(recipe_of(OUT, None))
        with allreduce_autocast(recipe=INT4):
            inside.set()
            release.wait(10)

    inside, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=look)
    with allreduce_autocast(recipe=FP8):
        thread.start()
        inside.wait(10)
        seen.append(recipe_of(OUT, None))
        release.set()
        thread.join()
    assert seen == [None, FP8]

    async def within(recipe, other: asyncio.Event, own: asyncio.Event):
        with allreduce_autocast(recipe=recipe):
            own.set()
            await other.wait()
            return recipe_of(OUT, None)

    async def both():
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(within(FP8, a, b), within(INT4, b, a))

    assert asyncio.run(both()) == [FP8, INT4]


@pytest.mark.parametrize(
    "arguments, field",
    [
        ({"recipe": "int8"}, "recipe='int8': no recipe; legal: an AllReduceRecipe such as Int8BlockScaling(), a Rec"),
        ({"group": -100}, "group=-100"),
        ({"enabled": 3}, "enabled=3: no yes or no; legal: True, False"),
    ],
)
def test_autocast_refuses_what_is_none(arguments, field):
    with pytest.raises(UserError) as error, allreduce_autocast(**arguments):
        pass
    one_line(error, field)


@pytest.mark.parametrize(
    "model, recipes, line",
    [
        ("x", INT8, "model='x': no model; legal: a torch.nn.Module"),
        (
            torch.nn.Linear(2, 2),
            INT8,
            "model='Linear': has no row-parallel linear that could follow recipes; legal: a M",
        ),
        (
            torch.nn.Linear(2, 2),
            "int8",
            "recipes='int8': no recipe; legal: an AllReduceRecipe such as Int8BlockScaling",
        ),
    ],
)
def test_set_recipes_refuses_what_is_none(model, recipes, line):
    with pytest.raises(UserError) as error:
        megatron_ssm_tp.set_recipes(model, recipes)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_without_sites_none_is_legal_and_a_stage_may_be_told():
    linear = torch.nn.Linear(2, 2)
    assert megatron_ssm_tp.set_recipes(linear, None) == megatron_ssm_tp.set_recipes(linear, INT8, strict=False) == []


def test_what_users_name_is_imported_from_the_package():
    from megatron_ssm_tp.layers.row_parallel import set_recipes

    for name in megatron_ssm_tp.__all__:
        assert getattr(megatron_ssm_tp, name).__name__ == name
    assert megatron_ssm_tp.set_recipes is set_recipes
    assert megatron_ssm_tp.allreduce_autocast is allreduce_autocast


@pytest.fixture
def kernels_not_yet_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_ssm_tp.comm.quantize_triton", raising=False)
    monkeypatch.delattr("megatron_ssm_tp.comm.quantize_triton", raising=False)
    quantize._triton.cache_clear()
    yield
    quantize._triton.cache_clear()


@pytest.mark.parametrize("missing", ["triton", "triton.language"])
def test_without_triton_there_are_no_kernels(kernels_not_yet_imported, monkeypatch, missing):
    monkeypatch.delitem(sys.modules, "megatron_ssm_tp.comm.tiles", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)  # importing it then fails as if it were not there
    assert quantize._triton() is None


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'tritonlike'", name="tritonlike"),
        ModuleNotFoundError("No module named 'megatron_ssm_tp.comm.tiles'", name="megatron_ssm_tp.comm.tiles"),
        ImportError("cannot import name 'jit' from 'triton'", name="triton"),
    ],
    ids=str,
)
def test_another_failure_to_import_the_kernels_surfaces(kernels_not_yet_imported, monkeypatch, error):
    class Finder:
        def find_spec(self, *_):
            raise error

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ImportError) as raised:
        quantize._triton()
    assert raised.value is error
