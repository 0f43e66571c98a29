"""Checked access to the fields of a config.json: each mistake is one line with field, value and what is legal."""

import math
from collections.abc import Mapping
from typing import Any

from ..config import DTYPES, Layer, RotaryConfig
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


def expanded(raw: Mapping[str, Any], hidden: int, field: str = "expand") -> int:
    """d_inner by the expansion factor, which may be a fraction."""
    width = int(get(raw, field, float, 2) * hidden)
    if width < 1:
        raise UserError(f"config.json {field}", raw[field], "leaves no channel", f"at least 1 / {hidden}")
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


def end_tokens(raw: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields of the tokens that end and begin a text."""
    begin = next(iter(read_token_ids(raw, "bos_token_id")), None)
    return {"eos_token_ids": read_token_ids(raw, "eos_token_id"), "bos_token_id": begin}


def check_activation(raw: Mapping[str, Any], field: str = "hidden_act") -> None:
    """The mixers' own activation: nothing but SiLU is found in any of them."""
    activation = get(raw, field, str, "silu")
    if activation not in ("silu", "swish"):
        raise UserError(f"config.json {field}", activation, "is not implemented", "silu")


# Hugging Face's names -> those of layers.mlp.ACTIVATIONS
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}


def mlp_activation(raw: Mapping[str, Any], field: str, default: str) -> str:
    activation = get(raw, field, str, default)
    if activation not in _ACTIVATIONS:
        raise UserError(f"config.json {field}", activation, "is not implemented", ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[activation]


def least_dt(raw: Mapping[str, Any], older: str = "time_step_min") -> tuple[float, float]:
    """Zamba2's and Nemotron-H's limits of dt: not below time_step_min (`older`: another name of it), which may be 0."""
    value = raw.get("time_step_min") if raw.get(older) is None else raw[older]
    value = 1e-3 if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError("config.json time_step_min", value, "is not a time", "0 or more")
    return float(value), math.inf


def rotary(raw: Mapping[str, Any], head_dim: int, partial: float = 1.0) -> RotaryConfig:
    """Rotary embedding as Hugging Face reads it: `rope_parameters`, or the older fields beside `rope_scaling`."""
    own = get(raw, "rope_scaling", dict, {}) | get(raw, "rope_parameters", dict, {})
    if nested := next((name for name, value in own.items() if isinstance(value, dict)), None):
        raise UserError("config.json rope_parameters", nested, "is of one kind of layer", "the same for all layers")
    fields = dict(raw) | own
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in ("default", "linear"):
        raise UserError("config.json rope_type", kind, "is not implemented", "default, linear")
    factor = get(fields, "factor", float) if kind == "linear" else 1.0
    dim = int(head_dim * get(fields, "partial_rotary_factor", float, partial))
    if dim % 2 or not 0 < dim <= head_dim:
        legal = f"an even number of channels, to {head_dim}"
        raise UserError("config.json partial_rotary_factor", dim / head_dim, f"turns {dim} channels", legal)
    return RotaryConfig(get(fields, "rope_theta", float, 10000.0), dim, factor)


# Names that Hugging Face gave the kinds of layers over time
_KINDS_OF_LAYERS = {
    "linear_attention": Layer.SSM,
    "mamba": Layer.SSM,
    "full_attention": Layer.ATTENTION,
    "attention": Layer.ATTENTION,
    "mlp": Layer.MLP,
    "hybrid": Layer.SHARED,
}


def layer_kinds(names: Any, field: str, legal: tuple[str, ...]) -> tuple[Layer, ...]:
    """A config's list of layer types; `legal` are the ones that this family has."""
    if not isinstance(names, list) or not names:
        raise UserError(f"config.json {field}", names, "is not a list of layers", f"a list of {', '.join(legal)}")
    for name in names:
        if name == "moe":
            raise UserError(f"config.json {field}", name, "needs mixture of experts", ", ".join(legal))
        if name not in legal or name not in _KINDS_OF_LAYERS:
            raise UserError(f"config.json {field}", name, "is not a kind of layer", ", ".join(legal))
    return tuple(_KINDS_OF_LAYERS[name] for name in names)


def dt_limit(raw: Mapping[str, Any], field: str) -> tuple[float, float]:
    """transformers 5 writes infinity as {"__float__": "Infinity"}, which JSON can hold; older files say Infinity."""
    limit = (0.0, math.inf) if raw.get(field) is None else raw[field]
    try:
        ends = tuple(float(end["__float__"] if isinstance(end, dict) else end) for end in limit)
    except (TypeError, ValueError, KeyError):
        ends = ()
    if len(ends) != 2 or not 0 <= ends[0] < ends[1]:
        raise UserError(f"config.json {field}", limit, "is not a range", "two numbers, the larger one last")
    return ends


def model_fields(family: str, raw: Mapping[str, Any], tied: bool, eps_field: str = "rms_norm_eps") -> dict[str, Any]:
    """ModelConfig's fields that all of them read alike; `tied` is the class's default."""
    return {
        "family": family,
        "vocab_size": get(raw, "vocab_size", int),
        "hidden_size": get(raw, "hidden_size", int),
        "norm_eps": get(raw, eps_field, float, 1e-5),
        "tied_embeddings": get(raw, "tie_word_embeddings", bool, tied),
        "residual_in_fp32": False,
        "dtype": read_dtype(raw),
        **end_tokens(raw),
    }


def attention_heads(raw: Mapping[str, Any], default_kv: int | None) -> tuple[int, int]:
    """Heads of queries, and of keys and values."""
    heads = get(raw, "num_attention_heads", int, 32)
    stated_null = "num_key_value_heads" in raw and raw["num_key_value_heads"] is None  # as many as queries
    return heads, get(raw, "num_key_value_heads", int, heads if stated_null or default_kv is None else default_kv)


def attention_head_dim(raw: Mapping[str, Any], width: int, heads: int, field: str = "head_dim") -> int:
    stated = get(raw, field, int, None)
    if stated is None and width % heads:
        raise UserError("config.json num_attention_heads", heads, f"does not divide {width}", f"a divisor of {width}")
    return stated or width // heads


def ssm_head_dim(raw: Mapping[str, Any], field: str, d_inner: int, heads: int) -> int:
    """Stated, or "auto"; heads x head_dim must be d_inner."""
    stated = None if raw.get(field) == "auto" else get(raw, field, int, None)
    if (stated or d_inner // heads) * heads != d_inner:
        raise UserError(f"config.json {field}", stated, f"x {heads} heads is not {d_inner}", "auto, or d_inner / heads")
    return stated or d_inner // heads
