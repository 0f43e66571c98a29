"""One frozen row a family: how its config.json is read and where its tensors are.

Adding a family that an existing mixer can run is adding a row. Traps of real checkpoints are data here, each with a
test in tests/test_checkpoint.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import GatedNormConfig, Mamba1Config, Mamba2Config, ModelConfig
from ..errors import UserError
from ..partition.layout import Parameter, model_parameters
from .fields import check_activation, dt_limit, dt_rank, expanded, get, read_dtype, read_token_ids

# ours -> theirs, less the prefixes; the same for all families whose code goes back to state-spaces'
_MODEL_NAMES = {
    "embedding.word_embeddings.weight": "backbone.embeddings.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER_NAMES = {
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


def _read_hf_mamba1(family: Family, raw: Mapping[str, Any]) -> ModelConfig:
    """HF MambaConfig and FalconMambaConfig. Defaults are those of the HF classes."""
    check_activation(raw)
    hidden = get(raw, "hidden_size", int)
    # falcon-mamba-7b says expand 16 beside intermediate_size 8192 = 2 x hidden: the latter is what the tensors have.
    d_inner = get(raw, "intermediate_size", int, None) or expanded(raw, hidden)
    return ModelConfig(
        family=family.name,
        vocab_size=get(raw, "vocab_size", int),
        hidden_size=hidden,
        num_layers=get(raw, "num_hidden_layers", int, None) or get(raw, "n_layer", int),
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
            bcdt_norm_eps=get(raw, "mixer_rms_eps", float, 1e-6) if family.bcdt_norms else None,
        ),
        eos_token_ids=read_token_ids(raw, "eos_token_id"),
        bos_token_id=next(iter(read_token_ids(raw, "bos_token_id")), None),
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
        proj_bias=get(ssm, "bias", bool, False),
        conv_bias=get(ssm, "conv_bias", bool, True),
        dt_limit=dt_limit(ssm, "dt_limit"),
    )


_STATE_SPACES_MIXERS = {"Mamba1": _state_spaces_mamba1, "Mamba2": _state_spaces_mamba2}


def _read_state_spaces(family: Family, raw: Mapping[str, Any]) -> ModelConfig:
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
        family=family.name,
        vocab_size=-(-get(raw, "vocab_size", int) // multiple) * multiple,
        hidden_size=hidden,
        num_layers=get(raw, "n_layer", int),
        norm_eps=1e-5,
        tied_embeddings=get(raw, "tie_embeddings", bool, True),
        residual_in_fp32=get(raw, "residual_in_fp32", bool, True),
        dtype=read_dtype(raw),
        mixer=_STATE_SPACES_MIXERS[layer](ssm, hidden),
        eos_token_ids=(0,),  # GPT-NeoX's <|endoftext|>, the tokenizer all of them were trained with
    )


def _read_hf_mamba2(family: Family, raw: Mapping[str, Any]) -> ModelConfig:
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
        family=family.name,
        vocab_size=get(raw, "vocab_size", int),
        hidden_size=hidden,
        num_layers=get(raw, "num_hidden_layers", int),
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
            proj_bias=get(raw, "use_bias", bool, False),
            conv_bias=get(raw, "use_conv_bias", bool, True),
            dt_limit=dt_limit(raw, "time_step_limit"),
        ),
        eos_token_ids=read_token_ids(raw, "eos_token_id"),
        bos_token_id=next(iter(read_token_ids(raw, "bos_token_id")), None),
    )


def _state_spaces_row(
    name: str, model_types: tuple[str, ...], read_config: Callable, bcdt_norms: bool = False
) -> Family:
    return Family(
        name=name,
        model_types=model_types,
        read_config=read_config,
        model_names=_MODEL_NAMES,
        layer_names=_LAYER_NAMES,
        layer_prefix="backbone.layers.{layer}.",
        # the originals and HF's first uploads say "embedding"
        aliases={"backbone.embeddings.weight": "backbone.embedding.weight"},
        bcdt_norms=bcdt_norms,
    )


FAMILIES: tuple[Family, ...] = (
    _state_spaces_row("mamba", ("mamba",), _read_hf_mamba1),
    _state_spaces_row("falcon_mamba", ("falcon_mamba",), _read_hf_mamba1, bcdt_norms=True),
    _state_spaces_row("state_spaces_mamba", (), _read_state_spaces),
    _state_spaces_row("mamba2", ("mamba2",), _read_hf_mamba2),
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
