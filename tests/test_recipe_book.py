"""The book of recipes by site, and its file: no ranks needed."""

import re
from pathlib import Path

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


ON = "matchers: {m: {type: glob, pattern: '*', config: int8, enabled: true}}"


@pytest.mark.parametrize(
    "text, said",
    [
        ("- 1", "recipe file=[1]: no mapping; legal: a mapping with configs, matchers"),
        ("", "recipe file=None: no mapping; legal: "),
        ("matcher: {}", "recipe file='matcher': unknown key; legal: configs, matchers"),
        ("matchers: [1]", "matchers=[1]: no mapping; legal: "),
        ("configs: {a: {recipe: int3}}", "configs.a.recipe='int3': unknown format; legal: none, bf16, int8, fp8, int4"),
        ("configs: {a: {block_size: 64}}", "configs.a.recipe=None: is missing; legal: none, bf16, int8, fp8, int4"),
        ("configs: {a: {recipe: int8, block_size: 3}}", "configs.a.block_size=3: no size of a block; legal: 16, 32"),
        ("configs: {a: {recipe: int8, blocksize: 3}}", "configs.a='blocksize': unknown key; legal: recipe, block_size"),
        ("configs: {a: int8}", "configs.a='int8': no mapping; legal: a mapping with recipe, block_size"),
        ("matchers: {m: {pattern: '*', config: int8, enabled: true}}", "matchers.m.type=None: unknown kind of matcher"),
        ("matchers: {m: {type: regex, pattern: '*', config: int8}}", "matchers.m.type='regex': unknown kind"),
        ("matchers: {m: {type: glob, config: int8}}", "matchers.m.pattern=None: no pattern; legal: a glob on"),
        (
            "matchers: {m: {type: glob, pattern: '*', config: int9}}",
            "matchers.m.config='int9': unknown config; legal: n",
        ),
        (
            "matchers: {m: {type: glob, pattern: '*', config: int8, enabled: 'on'}}",
            "matchers.m.enabled='on': no yes or",
        ),
        (
            "matchers: {m: {type: glob, glob: '*', config: int8}}",
            "matchers.m='glob': unknown key; legal: type, pattern",
        ),
        ("matchers: {m: [1]}", "matchers.m=[1]: no mapping"),
        (
            "a: {",
            "is not YAML: expected the node content, but found '<stream end>' (line 1, column 5); legal: a YAML f",
        ),
        ("a: \x01", "is not YAML: special characters are not allowed; legal: a YAML file with configs and matchers"),
        (
            "matchers: {m: {type: glob, pattern: '*', config: int8}}",
            "matchers=['m']: none of them is enabled: nothing wo",
        ),
        (
            "configs: {a: {recipe: int8}}",
            "matchers=None: there is none: nothing would be quantized; legal: matchers wi",
        ),
        (
            "configs: {a: {recipe: int8}}\nmatchers: {}",
            "matchers={}: there is none: nothing would be quantized; legal: m",
        ),
        (
            "matchers: {}",
            "matchers={}: there is none: nothing would be quantized; legal: matchers with `enabled: true`; or",
        ),
        ("configs:\nmatchers:\n", "matchers=None: there is none: nothing would be quantized; legal: matchers with"),
        (f"{ON}\n{ON}", "gives matchers twice; legal: each key once"),
        (
            "configs: {a: {recipe: int8}, b: {recipe: int4}, a: {recipe: int4}}",
            "gives configs.a twice; legal: each key",
        ),
        (ON.replace("pattern", "config: int4, pattern"), "gives matchers.m.config twice; legal: each key once"),
    ],
)
def test_a_wrong_file_is_said_in_one_line(tmp_path, text, said):
    path = tmp_path / "recipes.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        RecipeBook.from_yaml_file(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"tp_allreduce_cfg={str(path)!r}: {said}"), str(error.value)


def test_a_file_of_nothing_says_so(tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text("# nothing was within the budget\nconfigs: {}\nmatchers: {}\n")
    book = RecipeBook.from_yaml_file(path)
    book.check_sites(SITES)
    assert {book.recipe_for(site) for site in SITES} == {None}


def test_an_alias_in_a_file_is_no_key_given_twice(tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text("configs: {a: &a {recipe: int8, block_size: 64}, b: {<<: *a, block_size: 32}}\n" + ON)
    assert RecipeBook.from_yaml_file(path).recipe_for(OUT) == INT8
    path.write_text("configs: &a {b: *a}")
    with pytest.raises(UserError, match=r"configs\.b="):
        RecipeBook.from_yaml_file(path)


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
    path.write_text(yaml.safe_dump({"matchers": {"m": matcher | {"enabled": True}}}))
    book = RecipeBook.from_yaml_file(path)
    if said is None:
        return book.check_sites(SITES)
    with pytest.raises(UserError) as error:
        book.check_sites(SITES)
    line = f"matchers.m.pattern={pattern!r}: {said}; legal: a glob for some of {SHORT}; or enabled: false"
    assert str(error.value) == f"tp_allreduce_cfg={str(path)!r}: {line}"
    on = matcher | {"enabled": True}
    RecipeBook.from_config_dict({"matchers": {"m": matcher, "all": on | {"pattern": "*"}}}).check_sites(SITES)
    with pytest.raises(UserError, match=r"^matchers\.m\.pattern="):
        RecipeBook.from_config_dict({"matchers": {"m": on}}).check_sites(SITES)


@pytest.mark.parametrize(
    "patterns, earlier",
    [
        (["*", "decoder.layers.3.*"], "m0"),
        (["*.mixer.*", "*.mlp.*", "mtp.*", "*.layers.3.*"], "m0, m1"),
        (["*", "*x_proj"], None),  # x_proj's are left to it
        (["*.layers.3.*", "*"], None),
        (["*x_proj*", "*.mixer.x_proj"], "m0"),
        (["*", "*_proj*"], "m0"),  # which x_proj's do not follow
    ],
)
def test_a_matcher_that_decides_nothing_is_said(patterns, earlier):
    common = {"type": "glob", "config": "int8", "enabled": True}
    matchers = {f"m{index}": common | {"pattern": pattern} for index, pattern in enumerate(patterns)}
    book = RecipeBook.from_config_dict({"matchers": matchers})
    if earlier is None:
        return book.check_sites(SITES)
    with pytest.raises(UserError) as error:
        book.check_sites(SITES)
    last = f"m{len(patterns) - 1}"
    one_line(error, f"matchers.{last}.pattern={patterns[-1]!r}: decides nothing, for all that it fits is decided by m")
    one_line(error, f"matchers before it: {earlier}; legal: a place before them, or narrower globs there; or enabled")


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


@pytest.mark.parametrize("document", ["README.md", "docs/recipes.md"])
def test_the_documents_examples_are_files(document):
    [text] = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parent.parent / document).read_text(), re.DOTALL)
    book = book_of(text)
    book.check_sites(SITES)
    assert book.recipe_for("decoder.layers.0.mixer.out_proj") == Bf16()
    assert book.recipe_for(OUT) == Int8BlockScaling(block_size=64, min_bytes=65536)
