"""config.json of models with attention layers: Bamba, Falcon-H1, Nemotron-H. Defaults are those of the HF classes."""

import math
from collections.abc import Mapping
from typing import Any

from ..config import (
    AttentionConfig,
    GatedNormConfig,
    Layer,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
)
from ..errors import UserError
from .fields import (
    attention_head_dim,
    attention_heads,
    check_activation,
    dt_limit,
    expanded,
    get,
    layer_kinds,
    least_dt,
    mlp_activation,
    model_fields,
    rotary,
    ssm_head_dim,
)

Raw = Mapping[str, Any]


def _mamba2_of_bamba(raw: Raw, d_inner: int, norm: GatedNormConfig | None, **kwargs: Any) -> Mamba2Config:
    """The fields that Bamba and Falcon-H1 name alike."""
    heads = get(raw, "mamba_n_heads", int, 128)
    return Mamba2Config(
        n_heads=heads,
        head_dim=ssm_head_dim(raw, "mamba_d_head", d_inner, heads),
        n_groups=get(raw, "mamba_n_groups", int, 1),
        d_state=get(raw, "mamba_d_state", int, 256),
        d_conv=get(raw, "mamba_d_conv", int, 4),
        norm=norm,
        in_bias=get(raw, "mamba_proj_bias", bool, False),
        conv_bias=get(raw, "mamba_conv_bias", bool, True),
        dt_limit=dt_limit(raw, "time_step_limit"),
        **kwargs,
    )


def _attention_of_llama(raw: Raw, partial_rotary: float, **kwargs: Any) -> AttentionConfig:
    """The fields that Bamba and Falcon-H1 name alike."""
    hidden = get(raw, "hidden_size", int)
    heads, kv_heads = attention_heads(raw, 8)
    head_dim, bias = attention_head_dim(raw, hidden, heads), get(raw, "attention_bias", bool, False)
    return AttentionConfig(
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        d_in=hidden,
        scale=head_dim**-0.5,
        rotary=rotary(raw, head_dim, partial_rotary),
        qkv_bias=bias,
        out_bias=bias,
        **kwargs,
    )


def read_bamba(family: str, raw: Raw) -> ModelConfig:
    """HF BambaConfig: each of its layers is an SSM mixer or attention, and then an MLP."""
    check_activation(raw)
    common = model_fields(family, raw, tied=False)
    count, with_attention = get(raw, "num_hidden_layers", int, 32), raw.get("attn_layer_indices") or []
    if not isinstance(with_attention, list) or not all(index in range(count) for index in with_attention):
        legal = f"a list of layers, 0 to {count - 1}"
        raise UserError("config.json attn_layer_indices", with_attention, "are not layers", legal)
    first = [Layer.ATTENTION if index in with_attention else Layer.SSM for index in range(count)]
    d_inner = expanded(raw, common["hidden_size"], "mamba_expand")
    in_and_out = get(raw, "mamba_proj_bias", bool, False)
    return ModelConfig(
        **common,
        layers=tuple(kind for layer in first for kind in (layer, Layer.MLP)),
        mixer=_mamba2_of_bamba(raw, d_inner, GatedNormConfig(common["norm_eps"]), out_bias=in_and_out),
        attention=_attention_of_llama(raw, partial_rotary=0.5) if with_attention else None,
        mlp=MLPConfig(get(raw, "intermediate_size", int, 14336), "silu", True, get(raw, "mlp_bias", bool, False)),
    )


def _numbers(raw: Raw, field: str, count: int) -> tuple[float, ...]:
    """`count` multipliers; all 1 where the field is missing."""
    values = [1.0] * count if raw.get(field) is None else raw[field]
    numbers = isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    if not numbers or len(values) != count:
        raise UserError(f"config.json {field}", values, "are not multipliers", f"a list of {count} numbers")
    return tuple(float(value) for value in values)


def read_falcon_h1(family: str, raw: Raw) -> ModelConfig:
    """HF FalconH1Config: each of its layers is an SSM mixer beside attention, and then an MLP; muP multipliers.

    d_inner is mamba_d_ssm, whatever mamba_expand says.
    """
    check_activation(raw)
    common = model_fields(family, raw, tied=False)
    d_inner = get(raw, "mamba_d_ssm", int, None) or expanded(raw, common["hidden_size"], "mamba_expand")
    norm = None
    if get(raw, "mamba_rms_norm", bool, False):
        before = get(raw, "mamba_norm_before_gate", bool, True)
        norm = GatedNormConfig(common["norm_eps"], get(raw, "mamba_n_groups", int, 1), before)
    gate, down = _numbers(raw, "mlp_multipliers", 2)
    mlp = {"bias": get(raw, "mlp_bias", bool, False), "gate_multiplier": gate, "out_multiplier": down}
    return ModelConfig(
        **common,
        layers=(Layer.PARALLEL, Layer.MLP) * get(raw, "num_hidden_layers", int, 32),
        mixer=_mamba2_of_bamba(
            raw,
            d_inner,
            norm,
            out_bias=get(raw, "projectors_bias", bool, False),
            in_multiplier=get(raw, "ssm_in_multiplier", float, 1.0),
            band_multipliers=_numbers(raw, "ssm_multipliers", 5),
        ),
        attention=_attention_of_llama(
            raw,
            partial_rotary=1.0,
            in_multiplier=get(raw, "attention_in_multiplier", float, 1.0),
            key_multiplier=get(raw, "key_multiplier", float, 1.0),
        ),
        mlp=MLPConfig(get(raw, "intermediate_size", int, 14336), "silu", True, **mlp),
        embedding_multiplier=get(raw, "embedding_multiplier", float, 1.0),
        logits_multiplier=get(raw, "lm_head_multiplier", float, 1.0),
        ssm_multiplier=get(raw, "ssm_out_multiplier", float, 1.0),
        attention_multiplier=get(raw, "attention_out_multiplier", float, 1.0),
    )


_NEMOTRON_SYMBOLS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def read_nemotron_h(family: str, raw: Raw) -> ModelConfig:
    """HF NemotronHConfig, dense: SSM, attention and MLP layers. Its attention has no positions and no biases.

    HF clamps dt to time_step_min and does not read time_step_limit, and it never ties the embeddings, whatever
    tie_word_embeddings says; HF is followed.
    """
    check_activation(raw, "mamba_hidden_act")
    common = model_fields(family, raw, tied=False, eps_field="layer_norm_epsilon") | {"tied_embeddings": False}
    pattern = get(raw, "hybrid_override_pattern", str, None)
    named = raw.get("layers_block_type", raw.get("layer_types"))
    if named is None and pattern is not None:
        named = [_NEMOTRON_SYMBOLS.get(symbol, symbol) for symbol in pattern]
    layers = layer_kinds(
        named, "layers_block_type", ("linear_attention", "full_attention", "mlp", "mamba", "attention")
    )
    heads, kv_heads = attention_heads(raw, 8)
    head_dim, bias = get(raw, "head_dim", int, 128), get(raw, "use_bias", bool, False)
    groups = get(raw, "mamba_n_groups", int, None) or get(raw, "n_groups", int, 8)
    attention = AttentionConfig(heads, kv_heads, head_dim, common["hidden_size"], head_dim**-0.5)
    activation = mlp_activation(raw, "mlp_hidden_act", "relu2")
    mlp = MLPConfig(get(raw, "intermediate_size", int, 21504), activation, False, get(raw, "mlp_bias", bool, False))
    return ModelConfig(
        **common,
        layers=layers,
        mixer=Mamba2Config(
            n_heads=get(raw, "mamba_num_heads", int, 128),
            head_dim=get(raw, "mamba_head_dim", int, 64),
            n_groups=groups,
            d_state=get(raw, "ssm_state_size", int, 128),
            d_conv=get(raw, "mamba_d_conv", int, None) or get(raw, "conv_kernel", int, 4),
            norm=GatedNormConfig(common["norm_eps"], groups),
            in_bias=bias,
            out_bias=bias,
            conv_bias=get(raw, "mamba_conv_bias", bool, get(raw, "use_conv_bias", bool, True)),
            dt_limit=least_dt(raw, "mamba_dt_min"),
        ),
        attention=attention if Layer.ATTENTION in layers else None,
        mlp=mlp if Layer.MLP in layers else None,
    )
