"""Module-level specs for Megatron launch scripts: `--spec megatron_ssm_tp.layers.specs NAME`.

    mamba          Mamba-1: d_inner = 2 x hidden, d_conv 4, dt_rank = hidden / 16 rounded up
    falcon_mamba   the same with RMS norms (no weight, eps 1e-6) on dt, B and C

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

from ..config import Mamba1Config
from .mamba1_mixer import Mamba1Mixer, Mamba1MixerSubmodules
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


def mamba1_stack_spec(mixer_config) -> ModuleSpec:
    """A stack of Mamba-1 layers; `mixer_config` as in Mamba1Mixer: dimensions, or a function of Megatron's config."""
    projections = Mamba1MixerSubmodules(
        in_proj=ColumnParallelLinear, x_proj=RowParallelLinear, dt_proj=ColumnParallelLinear, out_proj=RowParallelLinear
    )
    mixer = ModuleSpec(module=Mamba1Mixer, params={"mixer_config": mixer_config}, submodules=projections)
    layer = MambaLayerSubmodules(norm=LocalRMSNorm, mixer=mixer, mamba_bda=get_bias_dropout_add)
    return ModuleSpec(
        module=SSMStack,
        submodules=HybridStackSubmodules(mamba_layer=ModuleSpec(module=MambaLayer, submodules=layer)),
    )


mamba = mamba1_stack_spec(_mamba_preset)
falcon_mamba = mamba1_stack_spec(_falcon_mamba_preset)
