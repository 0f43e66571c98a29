"""Which recipe each row-parallel reduction of a model uses.

A file says it in the grammar of Megatron's RecipeConfig (megatron.core.quantization): named configs, and matchers that
are tried in order against the site's module name, such as decoder.layers.3.mixer.out_proj.

    configs:
      small:  {recipe: int8, block_size: 64}
    matchers:
      last:   {type: glob, pattern: "decoder.layers.63.*", config: none, enabled: true}
      others: {type: glob, pattern: "*", config: small, enabled: true}

The formats' names (none, bf16, int8, fp8, int4) are configs without being listed. As in Megatron a matcher without
`enabled: true` is passed over, and a site that none matches is not quantized. Three rules are ours:

    - An x_proj feeds an exponential, so a matcher concerns it only if its pattern has the letters "x_proj" in it.
    - A book that a model is given may have no enabled matcher that decides none of its sites: because it fits none, or
      because earlier ones take all that it fits. Megatron's passes over such a matcher; a layer that is not there, a
      misspelt name or a wrong order would then look like a recipe that costs nothing. In a file for several models,
      set `enabled: false` where a matcher is of another one's.
    - One matcher is enabled. A file of nothing says so: `configs: {}` and `matchers: {}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core.quantization.quant_config import GlobMatcher, MatchContext, RecipeConfig

from ..errors import UserError
from .backends import check_named
from .recipe_file import in_file, parts_of, read_yaml
from .recipes import NONE, AllReduceRecipe

X_PROJ = "x_proj"


class RecipeBook:
    """Recipes by site.

    Args:
        rules: a RecipeConfig whose matchers are globs.
        recipes: what the rules' config names stand for.
    """

    # What `check_sites` holds a model to: the patterns of enabled matchers by name, and the file that they are in.
    _patterns: Mapping[str, str] = MappingProxyType({})
    _file: str | Path | None = None

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
        config = read_yaml(path)
        try:
            book = cls.from_config_dict(config)
        except UserError as error:
            raise in_file(path, error) from None
        book._file = path
        return book

    @classmethod
    def from_config_dict(cls, config: dict[str, Any]) -> RecipeBook:
        """From what a file holds: {"configs": {name: payload}, "matchers": {name: matcher}}.

        Raises:
            UserError: anything that Megatron's RecipeConfig would trip over later, or pass over.
        """
        payloads, recipes, matchers = parts_of(config)
        book = cls(RecipeConfig.from_config_dict({"configs": payloads, "matchers": matchers}), recipes)
        book._patterns = {name: matcher["pattern"] for name, matcher in matchers.items() if matcher.get("enabled")}
        return book

    def fingerprint(self) -> str:
        """The same text for books that say the same."""
        matchers = [(m.pattern, m.config_key) for m in self._rules.matchers]
        return repr((matchers, sorted((str(name), repr(recipe)) for name, recipe in self._recipes.items())))

    def check_sites(self, sites: Iterable[str]) -> None:
        """Hold the matchers of a file or a dict against all sites of a model. Without communication: all ranks with the
        same sites raise the same.

        Raises:
            UserError: an enabled matcher fits none of them, or none that earlier ones leave.
        """
        sites = list(sites)
        taken: dict[str, str] = {}  # names of matchers by site
        for name, pattern in self._patterns.items():
            globbed = [site for site in sites if fnmatch(site, pattern)]
            fitting = [site for site in globbed if X_PROJ in pattern or not _is_x_proj(site)]
            if not fitting:
                none = "no row-parallel linear of this model"
                problem = f"fits {f'only {X_PROJ}, whose letters it must have' if globbed else none}"
                self._refuse(name, problem, f"a glob for some of {_in_short(sites)}; or enabled: false")
            if all(site in taken for site in fitting):
                earlier = ", ".join(dict.fromkeys(str(taken[site]) for site in fitting))
                problem = f"decides nothing, for all that it fits is decided by matchers before it: {earlier}"
                self._refuse(name, problem, "a place before them, or narrower globs there; or enabled: false")
            taken = dict.fromkeys(fitting, name) | taken

    def _refuse(self, matcher: str, problem: str, legal: str) -> NoReturn:
        error = UserError(f"matchers.{matcher}.pattern", self._patterns[matcher], problem, legal)
        raise error if self._file is None else in_file(self._file, error)

    def check_backends(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Find out whether the backends that recipes in use name can reduce over `group`: see backends.check_named.

        Raises:
            UserError: one cannot; the same on every rank.
        """
        for key in dict.fromkeys(matcher.config_key for matcher in self._rules.matchers):
            recipe = self._recipes[key]
            try:
                if recipe is not None:
                    check_named(recipe, group, device)
            except UserError as error:
                if not self._patterns:
                    raise
                error = UserError(f"configs.{key}.{error.field}", error.value, error.problem, error.legal)
                raise (error if self._file is None else in_file(self._file, error)) from None

    def recipe_for(self, site: str) -> AllReduceRecipe | None:
        """The recipe of the reduction whose module is named `site`; None: Megatron's own all-reduce."""
        if site not in self._found:
            rules = self._x_proj_rules if _is_x_proj(site) else self._rules
            key = rules.match_to_config_key(MatchContext(module_path=site, layer_number=None))
            self._found[site] = None if key is None else self._recipes[key]
        return self._found[site]


def as_book(recipe: AllReduceRecipe | RecipeBook | str | None, field: str = "recipe") -> RecipeBook | None:
    """One recipe as a book of it everywhere but at x_proj; "none" as one of Megatron's own all-reduce everywhere.

    Raises:
        UserError: something else; `field` is what the caller calls it.
    """
    if isinstance(recipe, AllReduceRecipe):
        return RecipeBook.everywhere(recipe)
    if recipe is None or isinstance(recipe, RecipeBook):
        return recipe
    if recipe == NONE:
        return RecipeBook.everywhere(None)
    legal = f'an AllReduceRecipe such as Int8BlockScaling(), a RecipeBook, "{NONE}", None'
    raise UserError(field, recipe, "no recipe", legal)


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
