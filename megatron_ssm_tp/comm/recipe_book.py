"""Which recipe each row-parallel reduction of a model uses.

A file says it in the grammar of Megatron's RecipeConfig (megatron.core.quantization): named configs, and matchers that
are tried in order against the site's module name, such as decoder.layers.3.mixer.out_proj.

    configs:
      small:  {recipe: int8, block_size: 64}
    matchers:
      last:   {type: glob, pattern: "decoder.layers.63.*", config: none, enabled: true}
      others: {type: glob, pattern: "*", config: small, enabled: true}

The formats' names (none, bf16, int8, fp8, int4) are configs without being listed. As in Megatron a matcher without
`enabled: true` is passed over, and a site that none matches is not quantized. Two rules are ours:

    - An x_proj feeds an exponential, so a matcher concerns it only if its pattern has the letters "x_proj" in it.
    - A book that a model is given may have no enabled matcher that fits none of its sites. Megatron's passes over such
      a matcher; a layer that is not there, or a misspelt name, would then look like a recipe that costs nothing. In a
      file for several models, set `enabled: false` where a matcher is of another one's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from megatron.core.quantization.quant_config import GlobMatcher, MatchContext, RecipeConfig

from ..errors import UserError
from .recipes import FIELDS, RECIPE_NAMES, AllReduceRecipe, recipe_by_name

X_PROJ = "x_proj"
_MATCHER_FIELDS = ("type", "pattern", "config", "enabled")


class RecipeBook:
    """Recipes by site.

    Args:
        rules: a RecipeConfig whose matchers are globs.
        recipes: what the rules' config names stand for.
    """

    # What `check_sites` holds a model to: the patterns of enabled matchers by field, and the file that they are in.
    _patterns: Sequence[tuple[str, str]] = ()
    _file = ""

    def __init__(self, rules: RecipeConfig, recipes: dict[str, AllReduceRecipe | None]) -> None:
        self._rules, self._recipes = rules, recipes
        self._x_proj_rules = RecipeConfig([m for m in rules.matchers if X_PROJ in m.pattern], rules.configs)
        self._found: dict[str, AllReduceRecipe | None] = {}  # sites are few, and asked for at every forward pass

    @classmethod
    @cache  # with what it has found: a context may be entered for every token
    def everywhere(cls, recipe: AllReduceRecipe | None) -> RecipeBook:
        """One recipe for all sites but x_proj's."""
        return cls(RecipeConfig([GlobMatcher("*", "all")], {"all": {}}), {"all": recipe})

    @classmethod
    def from_yaml_file(cls, path: str | Path) -> RecipeBook:
        """Raises UserError: no such file, not YAML, or not what `from_config_dict` takes; all name the file."""
        import yaml

        try:
            config = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("tp_allreduce_cfg", str(path), f"cannot be read ({error})", "a YAML file") from None
        except yaml.YAMLError as error:
            problem = "is not YAML: " + " ".join(str(error).split())
            raise UserError("tp_allreduce_cfg", str(path), problem, "a YAML file with configs and matchers") from None
        try:
            book = cls.from_config_dict(config)
        except UserError as error:
            raise UserError(f"{path}: {error.field}", error.value, error.problem, error.legal) from None
        book._file = f"{path}: "
        return book

    @classmethod
    def from_config_dict(cls, config: dict[str, Any]) -> RecipeBook:
        """From what a file holds: {"configs": {name: payload}, "matchers": {name: matcher}}.

        Raises:
            UserError: anything that Megatron's RecipeConfig would trip over later, or pass over.
        """
        _keys("recipe file", config, ("configs", "matchers"))
        own = {} if config.get("configs") is None else config["configs"]
        matchers = {} if config.get("matchers") is None else config["matchers"]
        _keys("configs", own, None)
        _keys("matchers", matchers, None)
        payloads = {name: {"recipe": name} for name in RECIPE_NAMES} | own
        recipes = {name: _recipe(name, payload) for name, payload in payloads.items()}
        for name, matcher in matchers.items():
            _check_matcher(f"matchers.{name}", matcher, recipes)
        book = cls(RecipeConfig.from_config_dict({"configs": payloads, "matchers": matchers}), recipes)
        enabled = {name: matcher for name, matcher in matchers.items() if matcher.get("enabled")}
        book._patterns = [(f"matchers.{name}.pattern", matcher["pattern"]) for name, matcher in enabled.items()]
        return book

    def fingerprint(self) -> str:
        """The same text for books that say the same."""
        matchers = [(m.pattern, m.config_key) for m in self._rules.matchers]
        return repr((matchers, sorted((str(name), repr(recipe)) for name, recipe in self._recipes.items())))

    def check_sites(self, sites: Iterable[str]) -> None:
        """Hold the matchers of a file or a dict against all sites of a model; a matcher that is never asked because
        others come first is none of this. Without communication: all ranks with the same sites raise the same.

        Raises:
            UserError: an enabled matcher fits none of them.
        """
        sites = list(sites)
        for field, pattern in self._patterns:
            fitting = [site for site in sites if fnmatch(site, pattern)]
            if not any(X_PROJ in pattern or not _is_x_proj(site) for site in fitting):
                name = (
                    f"only {X_PROJ}, whose letters it must have" if fitting else "no row-parallel linear of this model"
                )
                legal = f"a glob for some of {_in_short(sites)}; or enabled: false"
                raise UserError(self._file + field, pattern, f"fits {name}", legal)

    def recipe_for(self, site: str) -> AllReduceRecipe | None:
        """The recipe of the reduction whose module is named `site`; None: Megatron's own all-reduce."""
        if site not in self._found:
            rules = self._x_proj_rules if _is_x_proj(site) else self._rules
            key = rules.match_to_config_key(MatchContext(module_path=site, layer_number=None))
            self._found[site] = None if key is None else self._recipes[key]
        return self._found[site]


def as_book(recipe: AllReduceRecipe | RecipeBook | None) -> RecipeBook | None:
    """One recipe as a book of it everywhere but at x_proj.

    Raises:
        UserError: something else.
    """
    if isinstance(recipe, AllReduceRecipe):
        return RecipeBook.everywhere(recipe)
    if recipe is None or isinstance(recipe, RecipeBook):
        return recipe
    raise UserError("recipe", recipe, "no recipe", "an AllReduceRecipe such as Int8BlockScaling(), a RecipeBook")


def _is_x_proj(site: str) -> bool:
    return X_PROJ in site.split(".")


def _in_short(sites: Sequence[str], most: int = 8) -> str:
    """decoder.layers.0.mixer.out_proj to decoder.layers.5.mixer.out_proj as decoder.layers.0..5.mixer.out_proj."""
    number = re.compile(r"(?<=\.)\d+(?=\.)")
    kinds: dict[str, list[list[int]]] = {}
    for site in sites:
        kinds.setdefault(number.sub("0", site), []).append([int(found) for found in number.findall(site)])
    shown = []
    for kind, rows in kinds.items():
        ends = iter([(min(column), max(column)) for column in zip(*rows, strict=True)])
        shown.append(number.sub(lambda _, ends=ends: "..".join(map(str, dict.fromkeys(next(ends)))), kind))
    more = f", and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more if shown else "the sites, of which there are none"


def _recipe(name: str, payload: Any) -> AllReduceRecipe | None:
    _keys(f"configs.{name}", payload, ("recipe", *FIELDS))
    fields = dict(payload)
    kind = fields.pop("recipe", None)
    if not isinstance(kind, str):
        raise UserError(f"configs.{name}.recipe", kind, "unknown format", ", ".join(RECIPE_NAMES))
    try:
        return recipe_by_name(kind, **fields)
    except UserError as error:
        raise UserError(f"configs.{name}.{error.field}", error.value, error.problem, error.legal) from None


def _check_matcher(name: str, matcher: Any, recipes: dict[str, AllReduceRecipe | None]) -> None:
    _keys(name, matcher, _MATCHER_FIELDS)
    if matcher.get("type") != "glob":
        raise UserError(f"{name}.type", matcher.get("type"), "unknown kind of matcher", "glob")
    if not isinstance(matcher.get("pattern"), str):
        raise UserError(f"{name}.pattern", matcher.get("pattern"), "no pattern", "a glob on module names")
    config = matcher.get("config")
    if not isinstance(config, str) or config not in recipes:
        raise UserError(f"{name}.config", config, "unknown config", ", ".join(map(str, recipes)))
    if not isinstance(matcher.get("enabled", False), bool):
        raise UserError(f"{name}.enabled", matcher["enabled"], "no yes or no", "true, false")


def _keys(name: str, found: Any, legal: tuple[str, ...] | None) -> None:
    """A mapping; with these keys and no others, if any are given."""
    if not isinstance(found, dict):
        raise UserError(name, found, "no mapping", "a mapping" + (f" with {', '.join(legal)}" if legal else ""))
    for key in found if legal else ():
        if key not in legal:
            raise UserError(name, key, "unknown key", ", ".join(legal))
