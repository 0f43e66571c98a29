"""The book of recipes by site, and its file: no ranks needed."""

import pytest
import yaml
from megatron.core.quantization.quant_config import GlobMatcher
from test_comm_recipes import FP8, INT4, INT8, OUT, X, one_line

from megatron_ssm_tp import UserError
from megatron_ssm_tp.comm.autocast import allreduce_autocast, recipe_of
from megatron_ssm_tp.comm.recipe_book import RecipeBook
from megatron_ssm_tp.comm.recipes import Bf16, Int8BlockScaling, recipe_by_name

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
