"""config.json of models of SSM layers alone: Hugging Face's Mamba, Falcon-Mamba and Mamba-2, and state-spaces'."""

from collections.abc import Mapping
from typing import Any

from ..config import GatedNormConfig, Layer, Mamba1Config, Mamba2Config, ModelConfig
from ..errors import UserError
from .fields import check_activation, dt_limit, dt_rank, end_tokens, expanded, get, read_dtype


def read_hf_mamba1(family: str, raw: Mapping[str, Any], bcdt_norms: bool = False) -> ModelConfig:
    """HF MambaConfig and FalconMambaConfig (`bcdt_norms`). Defaults are those of the HF classes."""
    check_activation(raw)
    hidden = get(raw, "hidden_size", int)
    # falcon-mamba-7b says expand 16 beside intermediate_size 8192 = 2 x hidden: the latter is what the tensors have.
    d_inner = get(raw, "intermediate_size", int, None) or expanded(raw, hidden)
    return ModelConfig(
        family=family,
        vocab_size=get(raw, "vocab_size", int),
        hidden_size=hidden,
        layers=(Layer.SSM,) * (get(raw, "num_hidden_layers", int, None) or get(raw, "n_layer", int)),
        norm_eps=get(raw, "layer_norm_epsilon", float, 1e-5),
        tied_embeddings=get(raw, "tie_word_embeddings", bool, True),
        residual_in_fp32=get(raw, "residual_in_fp32", bool, True),
        dtype=read_dtype(raw),
        mixer=Mamba1Config(
            d_inner=d_inner,
            d_state=get(raw, "state_size", int, 16),
            d_conv=get(raw, "conv_kernel", int, 4),
            dt_rank=dt_rank(raw, "time_step_rank", hidden),
            proj_bias=get(raw, "use_bias", bool, False),
            conv_bias=get(raw, "use_conv_bias", bool, True),
            bcdt_norm_eps=get(raw, "mixer_rms_eps", float, 1e-6) if bcdt_norms else None,
        ),
        **end_tokens(raw),
    )


def _state_spaces_mamba1(ssm: Mapping[str, Any], hidden: int) -> Mamba1Config:
    """ssm_cfg of mamba_ssm's Mamba; defaults are its."""
    return Mamba1Config(
        d_inner=expanded(ssm, hidden),
        d_state=get(ssm, "d_state", int, 16),
        d_conv=get(ssm, "d_conv", int, 4),
        dt_rank=dt_rank(ssm, "dt_rank", hidden),
        proj_bias=get(ssm, "bias", bool, False),
        conv_bias=get(ssm, "conv_bias", bool, True),
    )


def _state_spaces_mamba2(ssm: Mapping[str, Any], hidden: int) -> Mamba2Config:
    """ssm_cfg of mamba_ssm's Mamba2; defaults are its. It norms by group, where HF norms over the full width."""
    for field in ("d_ssm", "D_has_hdim"):
        if ssm.get(field):
            raise UserError(f"config.json ssm_cfg.{field}", ssm[field], "is not implemented", "null or false")
    head_dim, groups, d_inner = get(ssm, "headdim", int, 64), get(ssm, "ngroups", int, 1), expanded(ssm, hidden)
    if d_inner % head_dim:
        raise UserError("config.json ssm_cfg.headdim", head_dim, "does not divide d_inner", f"a divisor of {d_inner}")
    norm = GatedNormConfig(1e-5, groups, before_gate=get(ssm, "norm_before_gate", bool, False))
    return Mamba2Config(
        n_heads=d_inner // head_dim,
        head_dim=head_dim,
        n_groups=groups,
        d_state=get(ssm, "d_state", int, 128),
        d_conv=get(ssm, "d_conv", int, 4),
        norm=norm if get(ssm, "rmsnorm", bool, True) else None,
        in_bias=get(ssm, "bias", bool, False),
        out_bias=get(ssm, "bias", bool, False),
        conv_bias=get(ssm, "conv_bias", bool, True),
        dt_limit=dt_limit(ssm, "dt_limit"),
    )


_STATE_SPACES_MIXERS = {"Mamba1": _state_spaces_mamba1, "Mamba2": _state_spaces_mamba2}


def read_state_spaces(family: str, raw: Mapping[str, Any]) -> ModelConfig:
    """The original mamba-ssm MambaConfig, of Mamba or Mamba2 layers: no model_type, weights in pytorch_model.bin.

    Embedding rows are padded to a multiple. HF's conversion of the same files calls the padded number the vocabulary,
    and so does this: 50277 to 50279 are no tokens of GPT-NeoX's, but may be sampled in either.
    """
    ssm = get(raw, "ssm_cfg", dict, {})
    layer = get(ssm, "layer", str, "Mamba1")
    if layer not in _STATE_SPACES_MIXERS:
        raise UserError("config.json ssm_cfg.layer", layer, "is not implemented", ", ".join(_STATE_SPACES_MIXERS))
    for field in ("attn_layer_idx", "attn_cfg"):
        if raw.get(field):
            raise UserError(f"config.json {field}", raw[field], "is not implemented", "empty")
    if not get(raw, "rms_norm", bool, True):
        raise UserError("config.json rms_norm", False, "is not implemented", "true")
    hidden = get(raw, "d_model", int)
    multiple = get(raw, "pad_vocab_size_multiple", int, 8)
    return ModelConfig(
        family=family,
        vocab_size=-(-get(raw, "vocab_size", int) // multiple) * multiple,
        hidden_size=hidden,
        layers=(Layer.SSM,) * get(raw, "n_layer", int),
        norm_eps=1e-5,
        tied_embeddings=get(raw, "tie_embeddings", bool, True),
        residual_in_fp32=get(raw, "residual_in_fp32", bool, True),
        dtype=read_dtype(raw),
        mixer=_STATE_SPACES_MIXERS[layer](ssm, hidden),
        eos_token_ids=(0,),  # GPT-NeoX's <|endoftext|>, the tokenizer all of them were trained with
    )


def read_hf_mamba2(family: str, raw: Mapping[str, Any]) -> ModelConfig:
    """HF Mamba2Config. Defaults are those of the HF class.

    HF norms over the full width after the gate, whatever n_groups and norm_before_gate say (mamba-ssm would norm by
    group): Mamba-Codestral's config says norm_before_gate true and HF does not read it. HF is followed.
    """
    check_activation(raw)
    heads, head_dim = get(raw, "num_heads", int, 128), get(raw, "head_dim", int, 64)
    hidden, eps = get(raw, "hidden_size", int), get(raw, "layer_norm_epsilon", float, 1e-5)
    if expanded(raw, hidden) != heads * head_dim:
        legal = f"expand x hidden_size = {expanded(raw, hidden)}"
        raise UserError("config.json num_heads x head_dim", heads * head_dim, "is not d_inner", legal)
    return ModelConfig(
        family=family,
        vocab_size=get(raw, "vocab_size", int),
        hidden_size=hidden,
        layers=(Layer.SSM,) * get(raw, "num_hidden_layers", int),
        norm_eps=eps,
        tied_embeddings=get(raw, "tie_word_embeddings", bool, False),
        residual_in_fp32=get(raw, "residual_in_fp32", bool, True),
        dtype=read_dtype(raw),
        mixer=Mamba2Config(
            n_heads=heads,
            head_dim=head_dim,
            n_groups=get(raw, "n_groups", int, 8),
            d_state=get(raw, "state_size", int, 128),
            d_conv=get(raw, "conv_kernel", int, 4),
            norm=GatedNormConfig(eps),
            in_bias=get(raw, "use_bias", bool, False),
            out_bias=get(raw, "use_bias", bool, False),
            conv_bias=get(raw, "use_conv_bias", bool, True),
            dt_limit=dt_limit(raw, "time_step_limit"),
        ),
        **end_tokens(raw),
    )
