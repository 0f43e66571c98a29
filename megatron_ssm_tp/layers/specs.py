"""Module-level specs for Megatron launch scripts: `--spec megatron_ssm_tp.layers.specs NAME`.

    mamba          Mamba-1: d_inner = 2 x hidden, d_conv 4, dt_rank = hidden / 16 rounded up
    falcon_mamba   the same with RMS norms (no weight, eps 1e-6) on dt, B and C
    mamba2         Mamba-2 at any TP: d_conv 4, heads and groups by --mamba-num-heads (or 2 x hidden / head_dim),
                   --mamba-head-dim and --mamba-num-groups, gated norm by group as in Megatron's own mixer

d_state is Megatron's --mamba-state-dim. Beside --spec a script needs --hybrid-layer-pattern MMM...; in M*M-, `*` is
attention (without positions) and `-` an MLP, of Megatron's own options. Sizes that a preset does not cover come from a
spec of one's own: `name = mamba1_stack_spec(Mamba1Config(...))` in any importable module.
"""

import math

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from ..config import AttentionConfig, GatedNormConfig, Layer, Mamba1Config, Mamba2Config, MLPConfig, ModelConfig
from ..errors import UserError
from ..partition.parameters import adapter_tables
from .attention import Attention, AttentionSubmodules
from .layer import MixerLayer
from .lean_linear import LeanColumnParallelLinear
from .mamba1_mixer import Mamba1Mixer, Mamba1MixerSubmodules
from .mamba2_mixer import Mamba2Mixer, Mamba2MixerSubmodules
from .mlp import MLP, MLPSubmodules
from .norm import LocalRMSNorm
from .parallel import ParallelMixer, ParallelMixerSubmodules
from .row_parallel import RecipeRowParallelLinear
from .shared_block import SharedBlock, SharedBlockLayer, SharedBlockLayerSubmodules, SharedBlockSubmodules
from .stack import SharedBlockStack, SSMStack


def _mamba_preset(config: TransformerConfig, bcdt_norm_eps: float | None = None) -> Mamba1Config:
    return Mamba1Config(
        d_inner=2 * config.hidden_size,
        d_state=config.mamba_state_dim,
        d_conv=4,
        dt_rank=math.ceil(config.hidden_size / 16),
        bcdt_norm_eps=bcdt_norm_eps,
    )


def _falcon_mamba_preset(config: TransformerConfig) -> Mamba1Config:
    return _mamba_preset(config, bcdt_norm_eps=1e-6)


def _mamba2_preset(config: TransformerConfig) -> Mamba2Config:
    head_dim, d_inner = config.mamba_head_dim, 2 * config.hidden_size
    if config.mamba_num_heads is None and d_inner % head_dim:
        raise UserError("mamba_head_dim", head_dim, "does not divide 2 x hidden_size", f"a divisor of {d_inner}")
    return Mamba2Config(
        n_heads=config.mamba_num_heads or d_inner // head_dim,
        head_dim=config.mamba_head_dim,
        n_groups=config.mamba_num_groups,
        d_state=config.mamba_state_dim,
        d_conv=4,
        norm=GatedNormConfig(1e-5, groups=config.mamba_num_groups),
    )


def _attention_preset(config: TransformerConfig) -> AttentionConfig:
    for field in ("window_size", "qk_layernorm", "attention_output_gate", "multi_latent_attention"):
        if getattr(config, field, None):
            raise UserError(field, getattr(config, field), "is not implemented by this attention", "None or False")
    return AttentionConfig(
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        d_in=config.hidden_size,
        scale=config.softmax_scale or config.kv_channels**-0.5,
        qkv_bias=config.add_bias_linear or config.add_qkv_bias,
        out_bias=config.add_bias_linear,
    )


def _mlp_preset(config: TransformerConfig) -> MLPConfig:
    names = {F.gelu: "gelu", F.silu: "silu", squared_relu: "relu2"}
    if config.activation_func not in names:
        raise UserError("activation_func", config.activation_func, "is not implemented", ", ".join(names.values()))
    name, gated = names[config.activation_func], config.gated_linear_unit
    return MLPConfig(config.ffn_hidden_size, name, gated, bias=config.add_bias_linear)


def mamba1_spec(mixer_config, ops: str = "auto") -> ModuleSpec:
    """A Mamba-1 mixer; `mixer_config` as in Mamba1Mixer: dimensions, or a function of Megatron's config; `ops` too."""
    projections = Mamba1MixerSubmodules(
        in_proj=LeanColumnParallelLinear,
        x_proj=RecipeRowParallelLinear,
        dt_proj=LeanColumnParallelLinear,
        out_proj=RecipeRowParallelLinear,
    )
    return ModuleSpec(module=Mamba1Mixer, params={"mixer_config": mixer_config, "ops": ops}, submodules=projections)


def mamba2_spec(mixer_config, exact_norm: bool = False, ops: str = "auto") -> ModuleSpec:
    """A Mamba-2 mixer; all as in Mamba2Mixer."""
    projections = Mamba2MixerSubmodules(in_proj=LeanColumnParallelLinear, out_proj=RecipeRowParallelLinear)
    params = {"mixer_config": mixer_config, "exact_norm": exact_norm, "ops": ops}
    return ModuleSpec(module=Mamba2Mixer, params=params, submodules=projections)


def attention_spec(attention_config) -> ModuleSpec:
    """Attention; `attention_config` as in Attention."""
    projections = AttentionSubmodules(qkv=LeanColumnParallelLinear, out_proj=RecipeRowParallelLinear)
    return ModuleSpec(module=Attention, params={"attention_config": attention_config}, submodules=projections)


def mlp_spec(mlp_config) -> ModuleSpec:
    """An MLP; `mlp_config` as in MLP."""
    projections = MLPSubmodules(up=LeanColumnParallelLinear, down=RecipeRowParallelLinear)
    return ModuleSpec(module=MLP, params={"mlp_config": mlp_config}, submodules=projections)


def _layer(mixer: ModuleSpec | None) -> ModuleSpec | type:
    """x + mixer(norm(x)); None: layers of this kind cannot be built."""
    if mixer is None:
        return IdentityOp
    parts = MambaLayerSubmodules(norm=LocalRMSNorm, mixer=mixer, mamba_bda=get_bias_dropout_add)
    return ModuleSpec(module=MixerLayer, submodules=parts)


def stack_spec(ssm: ModuleSpec, attention: ModuleSpec | None = None, mlp: ModuleSpec | None = None) -> ModuleSpec:
    """A stack whose M, * and - layers have these mixers."""
    layers = HybridStackSubmodules(mamba_layer=_layer(ssm), attention_layer=_layer(attention), mlp_layer=_layer(mlp))
    return ModuleSpec(module=SSMStack, submodules=layers)


def mamba1_stack_spec(mixer_config) -> ModuleSpec:
    """A stack of Mamba-1 layers, with attention and MLP layers of the sizes of Megatron's config."""
    return stack_spec(mamba1_spec(mixer_config), attention_spec(_attention_preset), mlp_spec(_mlp_preset))


def mamba2_stack_spec(mixer_config, exact_norm: bool = False) -> ModuleSpec:
    """A stack of Mamba-2 layers, with attention and MLP layers of the sizes of Megatron's config."""
    ssm = mamba2_spec(mixer_config, exact_norm)
    return stack_spec(ssm, attention_spec(_attention_preset), mlp_spec(_mlp_preset))


def model_stack_spec(model: ModelConfig, exact_norm: bool = False, ops: str = "auto") -> ModuleSpec:
    """The stack of a checkpoint's model, its layers as `model.layers` says, in `layers.model.SYMBOLS`."""
    is_mamba1 = isinstance(model.mixer, Mamba1Config)
    ssm = mamba1_spec(model.mixer, ops) if is_mamba1 else mamba2_spec(model.mixer, exact_norm, ops)
    attention = attention_spec(model.attention) if model.attention else None
    mlp = mlp_spec(model.mlp) if model.mlp else None
    if model.shared:
        return _shared_block_stack(model, ssm, attention, mlp)
    if Layer.PARALLEL in model.layers:
        multipliers = {"ssm_multiplier": model.ssm_multiplier, "attention_multiplier": model.attention_multiplier}
        ssm = ModuleSpec(ParallelMixer, params=multipliers, submodules=ParallelMixerSubmodules(ssm, attention))
    spec = stack_spec(ssm, attention, mlp)
    spec.params = {"embedding_multiplier": model.embedding_multiplier}
    return spec


def _shared_block_stack(model: ModelConfig, ssm: ModuleSpec, attention: ModuleSpec, mlp: ModuleSpec) -> ModuleSpec:
    adapters = adapter_tables(model.shared, model.attention, model.mlp, model.hidden_size)
    calling = SharedBlockLayerSubmodules(
        norm=LocalRMSNorm, mixer=ssm, mamba_bda=get_bias_dropout_add, adapters=adapters
    )
    block = ModuleSpec(module=SharedBlock, submodules=SharedBlockSubmodules(attention, mlp))
    layers = HybridStackSubmodules(
        mamba_layer=_layer(ssm), attention_layer=ModuleSpec(module=SharedBlockLayer, submodules=calling)
    )
    params = {"count": model.shared.count, "block": block}
    return ModuleSpec(module=SharedBlockStack, params=params, submodules=layers)


mamba = mamba1_stack_spec(_mamba_preset)
falcon_mamba = mamba1_stack_spec(_falcon_mamba_preset)
mamba2 = mamba2_stack_spec(_mamba2_preset)
