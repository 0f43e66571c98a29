"""Recipes, the book of recipes by site, and allreduce_autocast: no ranks needed."""

import asyncio
import sys
import threading
from dataclasses import FrozenInstanceError

import pytest
import torch
import yaml
from megatron.core.quantization.quant_config import GlobMatcher

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
        (lambda: Float8BlockScaling(backend="nccl"), ("backend='nccl'", "auto, collective")),
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


BOOK = """
configs:
  small: {recipe: int8, block_size: 64}
  slow: {recipe: int4}
matchers:
  first: {type: glob, pattern: "decoder.layers.0.*", config: none, enabled: true}
  off: {type: glob, pattern: "*", config: slow}
  mlp: {type: glob, pattern: "*.mlp.*", config: fp8, enabled: true}
  rest: {type: glob, pattern: "decoder.*", config: small, enabled: true}
"""


def book_of(text: str) -> RecipeBook:
    return RecipeBook.from_config_dict(yaml.safe_load(text))


def test_the_first_matcher_that_matches_and_is_enabled_decides(tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text(BOOK)
    book = RecipeBook.from_yaml_file(path)
    for _ in range(2):  # found, and remembered
        assert book.recipe_for("decoder.layers.0.mixer.out_proj") is None
        assert book.recipe_for(OUT) == Int8BlockScaling(64)
        assert book.recipe_for("decoder.layers.0.mlp.linear_fc2") is None
        assert book.recipe_for("decoder.layers.10.mlp.linear_fc2") == FP8
        assert book.recipe_for("output_layer") is None


def test_the_same_file_is_read_by_megatron_alike(tmp_path):
    from megatron.core.quantization.utils import get_quant_config_or_none, load_quantization_recipe

    path = tmp_path / "recipes.yaml"
    path.write_text(BOOK + "  x: {type: glob, pattern: '*', config: slow, enabled: true}\n")
    theirs, ours = load_quantization_recipe(str(path)), RecipeBook.from_yaml_file(path)
    for site in (OUT, "embedding.word", "decoder.final"):
        config = get_quant_config_or_none(site, theirs).config
        assert recipe_by_name(config["recipe"], block_size=config.get("block_size", 128)) == ours.recipe_for(site)


@pytest.mark.parametrize(
    "pattern, found",
    [
        ("*", None),
        ("decoder.layers.*.mixer.*", None),
        ("*_proj", None),
        ("*x_proj*", INT8),
        (X, INT8),
        ("decoder.layers.[0-3].mixer.x_proj", INT8),
        ("decoder.layers.4.mixer.x_proj", None),
    ],
)
def test_x_proj_is_quantized_only_by_name(pattern, found):
    matchers = {"m": {"type": "glob", "pattern": pattern, "config": "int8", "enabled": True}}
    assert RecipeBook.from_config_dict({"matchers": matchers}).recipe_for(X) == found


def test_a_pattern_with_x_proj_in_it_takes_its_turn_for_other_sites():
    matchers = {
        "all": {"type": "glob", "pattern": "*", "config": "int4", "enabled": True},
        "x": {"type": "glob", "pattern": "*x_proj", "config": "int8", "enabled": True},
    }
    book = RecipeBook.from_config_dict({"matchers": matchers})
    assert book.recipe_for(X) == INT8 and book.recipe_for(OUT) == INT4
    assert book.recipe_for("decoder.max_proj") == INT4  # ends like it, but is no x_proj


def test_everywhere_is_all_but_x_proj():
    book = RecipeBook.everywhere(FP8)
    assert book.recipe_for(OUT) == FP8 and book.recipe_for(X) is None


def test_a_recipe_survives_a_file(tmp_path):
    for recipe in (Bf16(), Int8BlockScaling(64, 4096, "collective"), FP8, INT4):
        config = {"configs": {"c": recipe.as_config()}}
        config["matchers"] = {"m": {"type": "glob", "pattern": "*", "config": "c", "enabled": True}}
        path = tmp_path / "one.yaml"
        path.write_text(yaml.safe_dump(config))
        assert RecipeBook.from_yaml_file(path).recipe_for(OUT) == recipe


@pytest.mark.parametrize(
    "text, said",
    [
        ("- 1", ("recipes.yaml: recipe file=[1]",)),
        ("", ("recipe file=None",)),
        ("matcher: {}", ("matcher", "configs, matchers")),
        ("matchers: [1]", ("matchers",)),
        ("configs: {a: {recipe: int3}}", ("configs.a.recipe='int3'", "none, bf16, int8, fp8, int4")),
        ("configs: {a: {block_size: 64}}", ("configs.a.recipe=None", "int8")),
        ("configs: {a: {recipe: int8, block_size: 3}}", ("configs.a.block_size=3", "128")),
        ("configs: {a: {recipe: int8, blocksize: 3}}", ("blocksize", "block_size")),
        ("configs: {a: int8}", ("configs.a='int8'", "mapping")),
        ("matchers: {m: {pattern: '*', config: int8, enabled: true}}", ("matchers.m.type=None", "glob")),
        ("matchers: {m: {type: regex, pattern: '*', config: int8}}", ("matchers.m.type='regex'", "glob")),
        ("matchers: {m: {type: glob, config: int8}}", ("matchers.m.pattern=None",)),
        ("matchers: {m: {type: glob, pattern: '*', config: int9}}", ("matchers.m.config='int9'", "int8")),
        ("matchers: {m: {type: glob, pattern: '*', config: int8, enabled: 'on'}}", ("matchers.m.enabled='on'",)),
        ("matchers: {m: {type: glob, glob: '*', config: int8}}", ("'glob'", "type, pattern, config, enabled")),
        ("matchers: {m: [1]}", ("matchers.m",)),
        ("a: {", ("is not YAML",)),
    ],
)
def test_a_wrong_file_is_said_in_one_line(tmp_path, text, said):
    path = tmp_path / "recipes.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        RecipeBook.from_yaml_file(path)
    one_line(error, str(path), *said)


def test_a_dict_is_no_file():
    with pytest.raises(UserError, match=r"^configs\.a=1: no mapping"):
        RecipeBook.from_config_dict({"configs": {"a": 1}})


SITES = [f"decoder.layers.{i}.mixer.{name}" for i in range(12) for name in ("x_proj", "out_proj")]
SITES += ["decoder.layers.3.mlp.linear_fc2", "mtp.down"]
SHORT = (
    "decoder.layers.0..11.mixer.x_proj, decoder.layers.0..11.mixer.out_proj, decoder.layers.3.mlp.linear_fc2, mtp.down"
)


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("*", None),
        ("*.mixer.*", None),
        ("*.x_proj", None),
        ("decoder.layers.1[01].*", None),
        ("decoder.layers.12.*", "fits no row-parallel linear of this model"),
        ("out_proj", "fits no row-parallel linear of this model"),
        ("*.mixer.x*", "fits only x_proj, whose letters it must have"),
    ],
)
def test_a_matcher_that_fits_no_site_is_said(tmp_path, pattern, said):
    path = tmp_path / "recipes.yaml"
    matcher = {"type": "glob", "pattern": pattern, "config": "int8"}
    first = {"type": "glob", "pattern": "*", "config": "none", "enabled": True}  # that it never decides is no mistake
    path.write_text(yaml.safe_dump({"matchers": {"all": first, "m": matcher | {"enabled": True}}}, sort_keys=False))
    book = RecipeBook.from_yaml_file(path)
    if said is None:
        return book.check_sites(SITES)
    with pytest.raises(UserError) as error:
        book.check_sites(SITES)
    one_line(
        error, f"{path}: matchers.m.pattern={pattern!r}: {said}; legal: a glob for some of {SHORT}; or enabled: false"
    )
    RecipeBook.from_config_dict({"matchers": {"m": matcher}}).check_sites(SITES)  # not enabled
    with pytest.raises(UserError, match=r"^matchers\.m\.pattern="):
        RecipeBook.from_config_dict({"matchers": {"m": matcher | {"enabled": True}}}).check_sites(SITES)


def test_sites_of_many_kinds_are_cut_short_and_none_are_said():
    matcher = {"type": "glob", "pattern": "x", "config": "int8", "enabled": True}
    book = RecipeBook.from_config_dict({"matchers": {"m": matcher}})
    with pytest.raises(UserError) as error:
        book.check_sites(f"{name}.down" for name in "abcdefghij")
    one_line(error, "some of a.down, b.down, c.down, d.down, e.down, f.down, g.down, h.down, and 2 more; or")
    with pytest.raises(UserError) as error:
        book.check_sites([])
    one_line(error, "some of the sites, of which there are none")
    RecipeBook.everywhere(INT8).check_sites([])  # of one recipe for all nothing can be misspelt


def test_globs_are_tried_once_for_a_site(monkeypatch):
    tried = []
    match = GlobMatcher.match
    monkeypatch.setattr(GlobMatcher, "match", lambda *args: tried.append(args) or match(*args))
    book = book_of(BOOK)
    assert [book.recipe_for(OUT) for _ in range(3)] == 3 * [Int8BlockScaling(64)] and len(tried) == 3
    for _ in range(3):
        with allreduce_autocast(recipe=Int8BlockScaling(32)):
            assert recipe_of("mtp.out_proj", None) == Int8BlockScaling(32)
    assert len(tried) == 4


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as error:
        RecipeBook.from_yaml_file(tmp_path / "none.yaml")
    one_line(error, "none.yaml", "cannot be read")


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
        with allreduce_autocast(recipe=book_of(BOOK)):
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


@pytest.mark.parametrize("arguments, field", [({"recipe": "int8"}, "recipe='int8'"), ({"group": -100}, "group=-100")])
def test_autocast_refuses_what_is_none(arguments, field):
    with pytest.raises(UserError) as error, allreduce_autocast(**arguments):
        pass
    one_line(error, field)


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
