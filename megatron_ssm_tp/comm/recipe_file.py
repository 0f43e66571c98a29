"""Files of recipes by site, read and checked: what a RecipeBook is made of, see there for their grammar."""

from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, renamed
from .recipes import FIELDS, RECIPE_NAMES, AllReduceRecipe, recipe_by_name

FILE = "tp_allreduce_cfg"  # the field that errors in a file name
_PARTS = ("configs", "matchers")
_MATCHER_FIELDS = ("type", "pattern", "config", "enabled")
_NOTHING = "configs: {} with matchers: {} to quantize nothing"

Recipes = dict[str, AllReduceRecipe | None]


def read_yaml(path: str | Path) -> Any:
    """What a file holds.

    Raises:
        UserError: it cannot be read, is not YAML, or gives a key twice, of which YAML's loaders drop one in silence.
    """
    legal = "a YAML file with configs and matchers"
    try:
        loader = yaml.SafeLoader(Path(path).read_text())
        node = loader.get_single_node()
        again = _key_given_twice(node)
        found = None if node is None or again else loader.construct_document(node)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(FILE, str(path), f"cannot be read ({error})", legal) from None
    except yaml.YAMLError as error:
        raise UserError(FILE, str(path), f"is not YAML: {_in_words(error)}", legal) from None
    if again:
        raise UserError(FILE, str(path), f"gives {again} twice", "each key once")
    return found


def in_file(path: str | Path, error: UserError) -> UserError:
    """`error`, of a field in a file, as one that names the file too."""
    problem = str(error).removesuffix(f"; legal: {error.legal}")
    return UserError(FILE, str(path), problem, error.legal)


def parts_of(config: Any) -> tuple[dict[str, dict], Recipes, dict[str, dict]]:
    """Of what a file holds: payloads by config name, the formats' names among them; what they stand for; matchers.

    Raises:
        UserError: something in it is not legal, or no matcher is enabled.
    """
    _keys("recipe file", config, _PARTS)
    own = {} if config.get("configs") is None else config["configs"]
    matchers = {} if config.get("matchers") is None else config["matchers"]
    _keys("configs", own, None)
    _keys("matchers", matchers, None)
    payloads = {name: {"recipe": name} for name in RECIPE_NAMES} | own
    recipes = {name: _recipe(name, payload) for name, payload in payloads.items()}
    for name, matcher in matchers.items():
        _check_matcher(f"matchers.{name}", matcher, recipes)
    if not any(matcher.get("enabled") for matcher in matchers.values()):
        _check_that_nothing_is_meant(config, matchers)
    return payloads, recipes, matchers


def _check_that_nothing_is_meant(config: dict[str, Any], matchers: dict[str, dict]) -> None:
    """Nobody who lists configs or matchers wants none of them; both empty is what calibration without a find writes."""
    if matchers:
        legal = f"`enabled: true` in one or more of them; or {_NOTHING}"
        raise UserError("matchers", list(matchers), "none of them is enabled: nothing would be quantized", legal)
    if [config.get(part) for part in _PARTS] != [{}, {}]:
        legal = f"matchers with `enabled: true`; or {_NOTHING}"
        raise UserError("matchers", config.get("matchers"), "there is none: nothing would be quantized", legal)


def _recipe(name: str, payload: Any) -> AllReduceRecipe | None:
    field = f"configs.{name}"
    _keys(field, payload, ("recipe", *FIELDS))
    fields = dict(payload)
    kind = fields.pop("recipe", None)
    if not isinstance(kind, str):
        problem = "unknown format" if "recipe" in payload else "is missing"
        raise UserError(f"{field}.recipe", kind, problem, ", ".join(RECIPE_NAMES))
    with renamed(lambda own: f"{field}.{own}"):
        return recipe_by_name(kind, **fields)


def _check_matcher(name: str, matcher: Any, recipes: Recipes) -> None:
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


def _key_given_twice(node: yaml.Node | None) -> str:
    """Such as matchers.all; empty if there is none."""
    waiting, seen = [("", node)], set()
    while waiting:
        path, node = waiting.pop()
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:  # an alias may stand within what it names
            continue
        seen.add(id(node))
        names = [f"{path}{key.value}" for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        again = next((name for index, name in enumerate(names) if name in names[:index]), "")
        if again:
            return again
        waiting += [(f"{path}{key.value}.", value) for key, value in node.value]
    return ""


def _in_words(error: yaml.YAMLError) -> str:
    """In one line, without the picture of the place that YAML's own message has."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return str(getattr(error, "reason", error)).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})"
