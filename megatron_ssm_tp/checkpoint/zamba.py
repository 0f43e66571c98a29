"""config.json of models whose layers share transformer blocks: Zamba, Zamba2. Defaults are those of the HF classes."""

from collections.abc import Mapping
from typing import Any

from ..config import (
    AttentionConfig,
    GatedNormConfig,
    Layer,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    SharedBlocksConfig,
)
from ..errors import UserError
from .fields import (
    attention_head_dim,
    attention_heads,
    check_activation,
    dt_rank,
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


def _shared_attention(raw: Raw, hidden: int, **kwargs: Any) -> AttentionConfig:
    """Attention on [hidden, embedding]: scores are scaled by half the head's width, as in HF ZambaAttention."""
    d_in = get(raw, "attention_hidden_size", int, 2 * hidden)
    if d_in != 2 * hidden:
        raise UserError("config.json attention_hidden_size", d_in, "is not 2 x hidden_size", str(2 * hidden))
    heads, kv_heads = attention_heads(raw, None)
    head_dim = attention_head_dim(raw, d_in, heads, "attention_head_dim")
    return AttentionConfig(heads, kv_heads, head_dim, d_in, (head_dim / 2) ** -0.5, **kwargs)


_KINDS = ("linear_attention", "hybrid", "mamba")


def _counted(raw: Raw, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    count = get(raw, "num_hidden_layers", int, len(layers))
    if count != len(layers):
        raise UserError(
            "config.json num_hidden_layers", count, "is not the number of layers_block_type", str(len(layers))
        )
    return layers


def _zamba_layers(raw: Raw) -> tuple[Layer, ...]:
    """ZambaConfig's list, or the rule by which it is made."""
    named = raw.get("layers_block_type", raw.get("layer_types"))
    if named is None:
        period, offset = get(raw, "attn_layer_period", int, 6), get(raw, "attn_layer_offset", int, 4)
        rest = range(get(raw, "num_hidden_layers", int, 76) - 3)
        named = ["mamba", "mamba", "hybrid", *("hybrid" if i % period == offset else "mamba" for i in rest)]
    return _counted(raw, layer_kinds(named, "layers_block_type", _KINDS))


def _shared_blocks(layers: tuple[Layer, ...], tied: bool, count: int, **kwargs: Any) -> SharedBlocksConfig:
    """HF ties the blocks by the mechanism that ties the embeddings: untied, every call has a block of its own."""
    calls = layers.count(Layer.SHARED)
    if not calls:
        raise UserError("config.json layers_block_type", "none hybrid", "shares no block", "at least one hybrid layer")
    return SharedBlocksConfig(min(count, calls) if tied else calls, **kwargs)


def read_zamba(family: str, raw: Raw) -> ModelConfig:
    """HF ZambaConfig: Mamba-1 mixers of several heads, one transformer block that all hybrid layers share."""
    check_activation(raw, "hidden_mamba_act")
    common = model_fields(family, raw, tied=True)
    hidden, layers = common["hidden_size"], _zamba_layers(raw)
    activation = mlp_activation(raw, "hidden_act", "gelu")
    return ModelConfig(
        **common,
        layers=layers,
        mixer=Mamba1Config(
            d_inner=expanded(raw, hidden, "mamba_expand"),
            d_state=get(raw, "mamba_d_state", int, 16),
            d_conv=get(raw, "mamba_d_conv", int, 4),
            dt_rank=dt_rank(raw, "mamba_dt_rank", hidden),
            proj_bias=get(raw, "mamba_proj_bias", bool, False),
            conv_bias=get(raw, "mamba_conv_bias", bool, True),
            n_heads=get(raw, "n_mamba_heads", int, 2),
            interleaved=True,
        ),
        attention=_shared_attention({"num_attention_heads": 16, **raw}, hidden),
        mlp=MLPConfig(get(raw, "intermediate_size", int, 14848), activation, gated=True),
        shared=_shared_blocks(layers, common["tied_embeddings"], 1),
    )


def read_zamba2(family: str, raw: Raw) -> ModelConfig:
    """HF Zamba2Config: Mamba-2 mixers, shared blocks in turn with an adapter for every call.

    HF clamps dt to time_step_min in its scan and not in its one-token step; here both clamp, as in training.
    """
    common = model_fields(family, raw, tied=True)
    hidden, bias = common["hidden_size"], get(raw, "add_bias_linear", bool, False)
    named = raw.get("layers_block_type", raw.get("layer_types"))
    layers = _counted(raw, layer_kinds(named, "layers_block_type", _KINDS))
    d_inner, heads = expanded(raw, hidden, "mamba_expand"), get(raw, "n_mamba_heads", int, 8)
    groups, rank = get(raw, "mamba_ngroups", int, 1), get(raw, "adapter_rank", int, 128)
    attention = _shared_attention(raw, hidden)
    with_rotary = {"rotary": rotary(raw, attention.head_dim)} if get(raw, "use_mem_rope", bool, False) else {}
    activation = mlp_activation(raw, "hidden_act", "gelu")
    return ModelConfig(
        **common,
        layers=layers,
        mixer=Mamba2Config(
            n_heads=heads,
            head_dim=ssm_head_dim(raw, "mamba_headdim", d_inner, heads),
            n_groups=groups,
            d_state=get(raw, "mamba_d_state", int, 64),
            d_conv=get(raw, "mamba_d_conv", int, 4),
            norm=GatedNormConfig(1e-5, groups),
            in_bias=bias,
            out_bias=bias,
            dt_limit=least_dt(raw),
        ),
        attention=_shared_attention(raw, hidden, **with_rotary),
        mlp=MLPConfig(get(raw, "intermediate_size", int, 4 * hidden), activation, True, bias),
        shared=_shared_blocks(
            layers,
            common["tied_embeddings"],
            get(raw, "num_mem_blocks", int, 1),
            attention_adapter_rank=rank if get(raw, "use_shared_attention_adapter", bool, False) else None,
            mlp_adapter_rank=rank,
        ),
    )
