"""One frozen row a family: how its config.json is read and where its tensors are.

Adding a family that an existing mixer can run is adding a row. Traps of real checkpoints are data here, each with a
test in tests/test_checkpoint.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import DTYPES, Mamba1Config, ModelConfig
from ..errors import UserError
from ..partition.layout import Parameter, model_parameters

# ours -> theirs, less the prefixes; the same for both Mamba-1 families and for the state-spaces originals
_MAMBA1_MODEL_NAMES = {
    "embedding.word_embeddings.weight": "backbone.embeddings.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    "output_layer.weight": "lm_head.weight",
}
_MAMBA1_LAYER_NAMES = {
    "norm.weight": "norm.weight",
    "mixer.conv1d_weight": "mixer.conv1d.weight",
    "mixer.conv1d_bias": "mixer.conv1d.bias",
}


@dataclass(frozen=True)
class Family:
    """A row of the table.

    `model_names` maps our whole-model names to the file's, `layer_names` our names inside a layer to those behind
    `layer_prefix`; a name that is not listed is the same on both sides. `aliases` are other names under which the same
    tensor is found (file's name -> the other). `read_config` turns config.json into a ModelConfig. `bcdt_norms` says
    whether dt, B and C pass RMS norms without weight.
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[["Family", Mapping[str, Any]], ModelConfig]
    model_names: Mapping[str, str]
    layer_names: Mapping[str, str]
    layer_prefix: str
    aliases: Mapping[str, str]
    bcdt_norms: bool = False

    def file_name(self, ours: str) -> str:
        """The file's name of our parameter `ours`."""
        if not ours.startswith("decoder.layers."):
            return self.model_names[ours]
        layer, inner = ours.removeprefix("decoder.layers.").split(".", 1)
        return f"{self.layer_prefix.format(layer=layer)}{self.layer_names.get(inner, inner)}"

    def tensors(self, config: ModelConfig) -> dict[str, tuple[str, Parameter]]:
        """Every parameter of the model: our name -> (the file's name, its shape and cut)."""
        return {name: (self.file_name(name), parameter) for name, parameter in model_parameters(config).items()}

    def optional_names(self, config: ModelConfig) -> set[str]:
        """File names that may be present without being read: the head of a tied model is the embedding again."""
        return {self.model_names["output_layer.weight"]} if config.tied_embeddings else set()


_REQUIRED = object()


_KINDS = {
    int: "a positive integer",
    float: "a positive number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
}


def _get(raw: Mapping[str, Any], field: str, kind: type, default: Any = _REQUIRED) -> Any:
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


def _expanded(raw: Mapping[str, Any], hidden: int) -> int:
    """d_inner by the expansion factor, which may be a fraction."""
    return int(_get(raw, "expand", float, 2) * hidden)


def _dt_rank(raw: Mapping[str, Any], field: str, hidden: int) -> int:
    if raw.get(field) in ("auto", None):
        return math.ceil(hidden / 16)
    return _get(raw, field, int)


def _read_dtype(raw: Mapping[str, Any]) -> str:
    name = _get(raw, "dtype", str, None) or _get(raw, "torch_dtype", str, "float32")
    if name not in DTYPES:
        raise UserError("config.json dtype", name, "cannot be run", ", ".join(DTYPES))
    return name


def _read_token_ids(raw: Mapping[str, Any], field: str) -> tuple[int, ...]:
    """One id, several, or none: all three are found in the field."""
    value = raw.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise UserError(f"config.json {field}", value, "is not a token id", "an integer, a list of integers, or null")
    return tuple(ids)


def _check_activation(raw: Mapping[str, Any]) -> None:
    activation = _get(raw, "hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        raise UserError("config.json hidden_act", activation, "is not implemented", "silu")


def _read_hf_mamba1(family: Family, raw: Mapping[str, Any]) -> ModelConfig:
    """HF MambaConfig and FalconMambaConfig. Defaults are those of the HF classes."""
    _check_activation(raw)
    hidden = _get(raw, "hidden_size", int)
    # falcon-mamba-7b says expand 16 beside intermediate_size 8192 = 2 x hidden: the latter is what the tensors have.
    d_inner = _get(raw, "intermediate_size", int, None) or _expanded(raw, hidden)
    return ModelConfig(
        family=family.name,
        vocab_size=_get(raw, "vocab_size", int),
        hidden_size=hidden,
        num_layers=_get(raw, "num_hidden_layers", int, None) or _get(raw, "n_layer", int),
        norm_eps=_get(raw, "layer_norm_epsilon", float, 1e-5),
        tied_embeddings=_get(raw, "tie_word_embeddings", bool, True),
        residual_in_fp32=_get(raw, "residual_in_fp32", bool, True),
        dtype=_read_dtype(raw),
        mixer=Mamba1Config(
            d_inner=d_inner,
            d_state=_get(raw, "state_size", int, 16),
            d_conv=_get(raw, "conv_kernel", int, 4),
            dt_rank=_dt_rank(raw, "time_step_rank", hidden),
            proj_bias=_get(raw, "use_bias", bool, False),
            conv_bias=_get(raw, "use_conv_bias", bool, True),
            bcdt_norm_eps=_get(raw, "mixer_rms_eps", float, 1e-6) if family.bcdt_norms else None,
        ),
        eos_token_ids=_read_token_ids(raw, "eos_token_id"),
        bos_token_id=next(iter(_read_token_ids(raw, "bos_token_id")), None),
    )


def _read_state_spaces(family: Family, raw: Mapping[str, Any]) -> ModelConfig:
    """The original mamba-ssm MambaConfig: no model_type, weights in pytorch_model.bin.

    Embedding rows are padded to a multiple. HF's conversion of the same files calls the padded number the vocabulary,
    and so does this: 50277 to 50279 are no tokens of GPT-NeoX's, but may be sampled in either.
    """
    ssm = _get(raw, "ssm_cfg", dict, {})
    layer = ssm.get("layer", "Mamba1")
    if layer != "Mamba1":
        raise UserError("config.json ssm_cfg.layer", layer, "is not implemented", "Mamba1")
    for field in ("attn_layer_idx", "attn_cfg"):
        if raw.get(field):
            raise UserError(f"config.json {field}", raw[field], "is not implemented", "empty")
    if not _get(raw, "rms_norm", bool, True):
        raise UserError("config.json rms_norm", False, "is not implemented", "true")
    hidden = _get(raw, "d_model", int)
    multiple = _get(raw, "pad_vocab_size_multiple", int, 8)
    return ModelConfig(
        family=family.name,
        vocab_size=-(-_get(raw, "vocab_size", int) // multiple) * multiple,
        hidden_size=hidden,
        num_layers=_get(raw, "n_layer", int),
        norm_eps=1e-5,
        tied_embeddings=_get(raw, "tie_embeddings", bool, True),
        residual_in_fp32=_get(raw, "residual_in_fp32", bool, True),
        dtype=_read_dtype(raw),
        mixer=Mamba1Config(
            d_inner=_expanded(ssm, hidden),
            d_state=_get(ssm, "d_state", int, 16),
            d_conv=_get(ssm, "d_conv", int, 4),
            dt_rank=_dt_rank(ssm, "dt_rank", hidden),
            proj_bias=_get(ssm, "bias", bool, False),
            conv_bias=_get(ssm, "conv_bias", bool, True),
        ),
        eos_token_ids=(0,),  # GPT-NeoX's <|endoftext|>, the tokenizer all of them were trained with
    )


def _mamba1_row(name: str, model_types: tuple[str, ...], read_config: Callable, bcdt_norms: bool = False) -> Family:
    return Family(
        name=name,
        model_types=model_types,
        read_config=read_config,
        model_names=_MAMBA1_MODEL_NAMES,
        layer_names=_MAMBA1_LAYER_NAMES,
        layer_prefix="backbone.layers.{layer}.",
        # the originals and HF's first uploads say "embedding"
        aliases={"backbone.embeddings.weight": "backbone.embedding.weight"},
        bcdt_norms=bcdt_norms,
    )


FAMILIES: tuple[Family, ...] = (
    _mamba1_row("mamba", ("mamba",), _read_hf_mamba1),
    _mamba1_row("falcon_mamba", ("falcon_mamba",), _read_hf_mamba1, bcdt_norms=True),
    _mamba1_row("state_spaces_mamba", (), _read_state_spaces),
)


def find_family(raw: Mapping[str, Any]) -> Family:
    """The row for this config.json.

    Raises:
        UserError: the model_type is not in the table, or there is none and the config is not state-spaces'.
    """
    model_type = raw.get("model_type")
    if model_type is None and {"d_model", "n_layer"} <= raw.keys():
        return next(family for family in FAMILIES if family.name == "state_spaces_mamba")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UserError("config.json model_type", model_type, "is not a supported family", known)
