"""Checked access to the fields of a config.json: each mistake is one line with field, value and what is legal."""

import math
from collections.abc import Mapping
from typing import Any

from ..config import DTYPES
from ..errors import UserError

_REQUIRED = object()


_KINDS = {
    int: "a positive integer",
    float: "a positive number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
}


def get(raw: Mapping[str, Any], field: str, kind: type, default: Any = _REQUIRED) -> Any:
    """raw[field], checked: numbers must be positive, and a float may be written as an integer. A null is absent."""
    value, name, expected = raw.get(field), f"config.json {field}", _KINDS[kind]
    if value is None:
        if default is _REQUIRED:
            raise UserError(name, value, "is missing", expected)
        return default
    accepted = (int, float) if kind is float else kind
    right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if not right or (kind in (int, float) and not 0 < value < float("inf")):
        raise UserError(name, value, f"is not {expected}", expected)
    return value


def expanded(raw: Mapping[str, Any], hidden: int) -> int:
    """d_inner by the expansion factor, which may be a fraction."""
    width = int(get(raw, "expand", float, 2) * hidden)
    if width < 1:
        raise UserError("config.json expand", raw["expand"], "leaves no channel", f"at least 1 / {hidden}")
    return width


def dt_rank(raw: Mapping[str, Any], field: str, hidden: int) -> int:
    if raw.get(field) in ("auto", None):
        return math.ceil(hidden / 16)
    return get(raw, field, int)


def read_dtype(raw: Mapping[str, Any]) -> str:
    name = get(raw, "dtype", str, None) or get(raw, "torch_dtype", str, "float32")
    if name not in DTYPES:
        raise UserError("config.json dtype", name, "cannot be run", ", ".join(DTYPES))
    return name


def read_token_ids(raw: Mapping[str, Any], field: str) -> tuple[int, ...]:
    """One id, several, or none: all three are found in the field."""
    value = raw.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise UserError(f"config.json {field}", value, "is not a token id", "an integer, a list of integers, or null")
    return tuple(ids)


def check_activation(raw: Mapping[str, Any]) -> None:
    activation = get(raw, "hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        raise UserError("config.json hidden_act", activation, "is not implemented", "silu")


def dt_limit(raw: Mapping[str, Any], field: str) -> tuple[float, float]:
    """transformers 5 writes infinity as {"__float__": "Infinity"}, which JSON can hold; older files say Infinity."""
    limit = raw.get(field) or (0.0, math.inf)
    try:
        ends = tuple(float(end["__float__"] if isinstance(end, dict) else end) for end in limit)
    except (TypeError, ValueError, KeyError):
        ends = ()
    if len(ends) != 2 or not 0 <= ends[0] < ends[1]:
        raise UserError(f"config.json {field}", limit, "is not a range", "two numbers, the larger one last")
    return ends
