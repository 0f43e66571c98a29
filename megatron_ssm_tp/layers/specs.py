"""Module-level specs for Megatron launch scripts: `--spec megatron_ssm_tp.layers.specs NAME`.

    mamba          Mamba-1: d_inner = 2 x hidden, d_conv 4, dt_rank = hidden / 16 rounded up
    falcon_mamba   the same with RMS norms (no weight, eps 1e-6) on dt, B and C
    mamba2         Mamba-2 at any TP: d_conv 4, heads and groups by --mamba-num-heads (or 2 x hidden / head_dim),
                   --mamba-head-dim and --mamba-num-groups, gated norm by group as in Megatron's own mixer

d_state is Megatron's --mamba-state-dim. Beside --spec a script needs --hybrid-layer-pattern MMM... Sizes that a preset
does not cover come from a spec of one's own: `name = mamba1_stack_spec(Mamba1Config(...))` in any importable module.
"""

import math

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from ..config import GatedNormConfig, Mamba1Config, Mamba2Config
from ..errors import UserError
from .mamba1_mixer import Mamba1Mixer, Mamba1MixerSubmodules
from .mamba2_mixer import Mamba2Mixer, Mamba2MixerSubmodules
from .norm import LocalRMSNorm
from .stack import SSMStack


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


def mamba1_stack_spec(mixer_config) -> ModuleSpec:
    """A stack of Mamba-1 layers; `mixer_config` as in Mamba1Mixer: dimensions, or a function of Megatron's config."""
    projections = Mamba1MixerSubmodules(
        in_proj=ColumnParallelLinear, x_proj=RowParallelLinear, dt_proj=ColumnParallelLinear, out_proj=RowParallelLinear
    )
    return _stack_of(ModuleSpec(module=Mamba1Mixer, params={"mixer_config": mixer_config}, submodules=projections))


def _stack_of(mixer: ModuleSpec) -> ModuleSpec:
    layer = MambaLayerSubmodules(norm=LocalRMSNorm, mixer=mixer, mamba_bda=get_bias_dropout_add)
    return ModuleSpec(
        module=SSMStack,
        submodules=HybridStackSubmodules(mamba_layer=ModuleSpec(module=MambaLayer, submodules=layer)),
    )


def mamba2_stack_spec(mixer_config, exact_norm: bool = False) -> ModuleSpec:
    """A stack of Mamba-2 layers; `mixer_config` and `exact_norm` as in Mamba2Mixer."""
    projections = Mamba2MixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    params = {"mixer_config": mixer_config, "exact_norm": exact_norm}
    return _stack_of(ModuleSpec(module=Mamba2Mixer, params=params, submodules=projections))


def stack_spec(mixer_config: Mamba1Config | Mamba2Config) -> ModuleSpec:
    """The stack for these dimensions."""
    build = mamba1_stack_spec if isinstance(mixer_config, Mamba1Config) else mamba2_stack_spec
    return build(mixer_config)


mamba = mamba1_stack_spec(_mamba_preset)
falcon_mamba = mamba1_stack_spec(_falcon_mamba_preset)
mamba2 = mamba2_stack_spec(_mamba2_preset)
