"""One frozen row a family: how its config.json is read and where its tensors are.

Adding a family that the existing layers can run is adding a row. Traps of real checkpoints are data here, each with a
test in tests/test_checkpoint.py or tests/test_hybrids.py.
"""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config import Layer, Mamba1Config, ModelConfig
from ..errors import UserError
from ..partition.layout import block_prefix, layer_prefix, model_parameters
from ..partition.parameters import Parameter
from .hybrids import read_bamba, read_falcon_h1, read_nemotron_h
from .names import HeadsFirst, Rules, Stored, attention_rules, gated_mlp_rules, mixer_rules, stored
from .pure_ssm import read_hf_mamba1, read_hf_mamba2, read_state_spaces
from .zamba import read_zamba, read_zamba2

_LAYER = re.compile(rf"{re.escape(layer_prefix(0)).replace('0', r'(\d+)')}(.+)")
_BLOCK = re.compile(rf"{re.escape(block_prefix(0)).replace('0', r'(\d+)')}(.+)")


@dataclass(frozen=True)
class Family:
    """A row of the table.

    `read_config` turns the family's name and config.json into a ModelConfig. Rules (see `names`) say where parameters
    are: of the whole model, of layers by kind, and of shared blocks. In them {layer} is the file's number of a layer,
    of which `layers_each` of ours make one; {home} is the layer under which a shared block is stored, the first that
    calls it, and {call} counts the calls. `aliases` are other beginnings of the same names; what matches `ignored` may
    be in a file and is not read, and so may copies of a block's tensors under later calls of it (`copies`: the number
    of the layer, and what follows).
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[str, Mapping[str, Any]], ModelConfig]
    model_rules: Rules
    layer_rules: Mapping[Layer, Rules]
    layers_each: int = 1
    block_rules: Rules | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: str = r"rotary_emb\.inv_freq$"
    copies: str | None = None

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """The model of this config.json.

        Raises:
            UserError: a field that is missing, wrong, or asks for what is not implemented.
        """
        config = self.read_config(self.name, raw)
        if not config.ssm_states:
            raise UserError("config.json layers_block_type", "none SSM", "is not for this package", "some SSM layers")
        return config

    def find(self, ours: str, config: ModelConfig) -> Stored:
        """Where our parameter `ours` is in the file."""
        heads = config.mixer.n_heads if isinstance(config.mixer, Mamba1Config) else 1
        callers = config.callers
        if match := _BLOCK.fullmatch(ours):
            return stored(self.block_rules, match[2], home=callers[int(match[1])])
        if match := _LAYER.fullmatch(ours):
            layer = int(match[1])
            places = {"layer": layer // self.layers_each}
            if layer in callers:
                call = callers.index(layer)
                places |= {"call": call, "home": callers[call % config.shared.count]}
            return stored(self.layer_rules[config.layers[layer]], match[2], heads, **places)
        return stored(self.model_rules, ours)

    def tensors(self, config: ModelConfig) -> dict[str, tuple[Stored, Parameter]]:
        """Every parameter of the model: our name -> (where it is in the file, its shape and cut)."""
        return {name: (self.find(name, config), parameter) for name, parameter in model_parameters(config).items()}

    def may_hold(self, name: str, config: ModelConfig, read: Set[str]) -> bool:
        """Whether a file may have this name though only those of `read` are: the head of a tied model, a copy."""
        heads = self.find("output_layer.weight", config).names if config.tied_embeddings else ()
        if name in heads or re.search(self.ignored, name):
            return True
        match = re.fullmatch(self.copies, name) if self.copies else None
        callers = config.callers
        if match is None or int(match[1]) not in callers:
            return False
        home = callers[callers.index(int(match[1])) % config.shared.count]
        return name[: match.start(1)] + str(home) + name[match.end(1) :] in read


def _backbone(name: str, model_types: tuple[str, ...], read_config: Callable) -> Family:
    """A family whose code goes back to state-spaces'."""
    layer = "backbone.layers.{layer}."
    return Family(
        name=name,
        model_types=model_types,
        read_config=read_config,
        model_rules={
            "embedding.word_embeddings.": "backbone.embeddings.",
            "decoder.final_norm.": "backbone.norm_f.",
            "output_layer.": "lm_head.",
        },
        layer_rules={Layer.SSM: {"norm.": f"{layer}norm.", **mixer_rules("mixer.", f"{layer}mixer.")}},
        # the originals and HF's first uploads say "embedding"
        aliases=(("backbone.embeddings.", "backbone.embedding."),),
    )


_LLAMA = "model.layers.{layer}."
_LLAMA_MODEL: Rules = {
    "embedding.word_embeddings.": "model.embed_tokens.",
    "decoder.final_norm.": "model.final_layernorm.",
    "output_layer.": "lm_head.",
}
_LLAMA_MLP: Rules = {
    "norm.": f"{_LLAMA}pre_ff_layernorm.",
    **gated_mlp_rules("mixer.", f"{_LLAMA}feed_forward."),
}
_LLAMA_NORM: Rules = {"norm.": f"{_LLAMA}input_layernorm."}

_BAMBA = Family(
    name="bamba",
    model_types=("bamba",),
    read_config=read_bamba,
    model_rules=_LLAMA_MODEL,
    layers_each=2,
    layer_rules={
        Layer.SSM: {**_LLAMA_NORM, **mixer_rules("mixer.", f"{_LLAMA}mamba.")},
        Layer.ATTENTION: {**_LLAMA_NORM, **attention_rules("mixer.", f"{_LLAMA}self_attn.")},
        Layer.MLP: _LLAMA_MLP,
    },
)

_FALCON_H1 = Family(
    name="falcon_h1",
    model_types=("falcon_h1",),
    read_config=read_falcon_h1,
    model_rules=_LLAMA_MODEL,
    layers_each=2,
    layer_rules={
        Layer.PARALLEL: {
            **_LLAMA_NORM,
            **mixer_rules("mixer.ssm.", f"{_LLAMA}mamba."),
            **attention_rules("mixer.attention.", f"{_LLAMA}self_attn."),
        },
        Layer.MLP: _LLAMA_MLP,
    },
)

_NEMOTRON_NORM: Rules = {"norm.": f"{_LLAMA}norm."}
_NEMOTRON_H = Family(
    name="nemotron_h",
    model_types=("nemotron_h",),
    read_config=read_nemotron_h,
    model_rules={
        "embedding.word_embeddings.": "model.embeddings.",
        "decoder.final_norm.": "model.norm_f.",
        "output_layer.": "lm_head.",
    },
    layer_rules={
        Layer.SSM: {**_NEMOTRON_NORM, **mixer_rules("mixer.", f"{_LLAMA}mixer.")},
        Layer.ATTENTION: {**_NEMOTRON_NORM, **attention_rules("mixer.", f"{_LLAMA}mixer.")},
        Layer.MLP: {
            **_NEMOTRON_NORM,
            "mixer.up.": f"{_LLAMA}mixer.up_proj.",
            "mixer.down.": f"{_LLAMA}mixer.down_proj.",
        },
    },
    aliases=(("model.", "backbone."),),  # as NVIDIA's own uploads say
    ignored=r"^mtp\.|rotary_emb\.inv_freq$",  # heads for several tokens at once; HF does not read them either
)

_IN_HYBRID = f"{_LLAMA}mamba_decoder."


def _zamba_heads(prefix: str) -> Rules:
    """Zamba-1's mixer: what belongs to a head has a leading dimension of heads."""
    return {
        **mixer_rules("mixer.", prefix),
        "mixer.x_proj.weight": HeadsFirst(f"{prefix}x_proj_weight", 1),
        "mixer.dt_proj.weight": HeadsFirst(f"{prefix}dt_proj_weight", 0),
        "mixer.dt_proj.bias": HeadsFirst(f"{prefix}dt_proj_bias", 0),
        "mixer.A_log": HeadsFirst(f"{prefix}A_log", 0),
        "mixer.D": HeadsFirst(f"{prefix}D", 0),
    }


def _block(prefix: str, mlp: Rules) -> Rules:
    return {
        "input_norm.": f"{prefix}input_layernorm.",
        **attention_rules("attention.", f"{prefix}self_attn."),
        "mlp_norm.": f"{prefix}pre_ff_layernorm.",
        **mlp,
    }


_ZAMBA_BLOCK = "model.layers.{home}.shared_transf."
_ZAMBA = Family(
    name="zamba",
    model_types=("zamba",),
    read_config=read_zamba,
    model_rules=_LLAMA_MODEL,
    layer_rules={
        Layer.SSM: {**_LLAMA_NORM, **_zamba_heads(f"{_LLAMA}mamba.")},
        Layer.SHARED: {
            "norm.": f"{_IN_HYBRID}input_layernorm.",
            "linear.": f"{_LLAMA}linear.",
            **_zamba_heads(f"{_IN_HYBRID}mamba."),
        },
    },
    block_rules=_block(_ZAMBA_BLOCK, gated_mlp_rules("mlp.", f"{_ZAMBA_BLOCK}feed_forward.")),
    copies=r"model\.layers\.(\d+)\.shared_transf\..+",
)

_ZAMBA2_BLOCK = "model.layers.{home}.shared_transformer."
_ZAMBA2 = Family(
    name="zamba2",
    model_types=("zamba2",),
    read_config=read_zamba2,
    model_rules=_LLAMA_MODEL,
    layer_rules={
        Layer.SSM: {**_LLAMA_NORM, **mixer_rules("mixer.", f"{_LLAMA}mamba.")},
        Layer.SHARED: {
            "norm.": f"{_IN_HYBRID}input_layernorm.",
            "linear.": f"{_LLAMA}linear.",
            **mixer_rules("mixer.", f"{_IN_HYBRID}mamba."),
            **{
                f"adapters.{name}.{half}.": f"{_ZAMBA2_BLOCK}self_attn.linear_{name}_adapter_list.{{call}}.{index}."
                for name in "qkv"
                for index, half in enumerate(("down", "up"))
            },
            "adapters.up.down.": f"{_ZAMBA2_BLOCK}feed_forward.gate_up_proj_adapter_list.{{call}}.0.",
            "adapters.up.up.": f"{_ZAMBA2_BLOCK}feed_forward.gate_up_proj_adapter_list.{{call}}.1.",
        },
    },
    block_rules=_block(
        _ZAMBA2_BLOCK,
        {
            "mlp.up.": f"{_ZAMBA2_BLOCK}feed_forward.gate_up_proj.",
            "mlp.down.": f"{_ZAMBA2_BLOCK}feed_forward.down_proj.",
        },
    ),
    copies=r"model\.layers\.(\d+)\.shared_transformer\..+",
)

FAMILIES: tuple[Family, ...] = (
    _backbone("mamba", ("mamba",), read_hf_mamba1),
    _backbone("falcon_mamba", ("falcon_mamba",), partial(read_hf_mamba1, bcdt_norms=True)),
    _backbone("state_spaces_mamba", (), read_state_spaces),
    _backbone("mamba2", ("mamba2",), read_hf_mamba2),
    _ZAMBA,
    _ZAMBA2,
    _BAMBA,
    _FALCON_H1,
    _NEMOTRON_H,
)
NEED_EXPERTS = ("jamba", "granitemoehybrid")


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
    problem = "needs mixture of experts" if model_type in NEED_EXPERTS else "is not a supported family"
    raise UserError("config.json model_type", model_type, problem, known)
