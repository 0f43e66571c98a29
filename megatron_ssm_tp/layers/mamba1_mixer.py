"""The Mamba-1 mixer with tensor parallelism (arXiv 2602.21144; HF MambaMixer and FalconMambaMixer).

Shape ledger on one of p ranks, T tokens, h = hidden, D = d_inner, N = d_state, R = dt_rank:

    in_proj    column-parallel   [T, h]   -> x, z [T, D/p] each      no communication
    conv1d     depthwise         [T, D/p] -> [T, D/p]
    x_proj     row-parallel      [T, D/p] -> dt, B, C [T, R + 2N]    all-reduce 1: R + 2N values a token
    norms      (Falcon-Mamba)    after the reduction, where dt, B and C are whole
    dt_proj    column-parallel   [T, R]   -> [T, D/p]                no communication
    scan       A_log, D, state   [T, D/p] -> [T, D/p]                state never crosses ranks
    out_proj   row-parallel      [T, D/p] -> [T, h]                  all-reduce 2: h values a token

Backward mirrors it: B and C are replicated but feed rank-local channels, so their gradients are summed over the ranks
(copy_to_tensor_model_parallel_region); dt's are summed by dt_proj's own input gradient, x's by in_proj's.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ..config import Mamba1Config
from ..ops import reference as ops
from ..partition.layout import mamba1_parameters, state_shapes
from .initialization import filled_later, initialize_mamba1
from .mixer import SSMMixer, Tensors
from .norm import rms_normalize


@dataclass
class Mamba1MixerSubmodules:
    """The four projections: Megatron's ColumnParallelLinear (in, dt) and RowParallelLinear (x, out), or their likes."""

    in_proj: ModuleSpec | type
    x_proj: ModuleSpec | type
    dt_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class Mamba1Mixer(SSMMixer):
    """One Mamba-1 mixer, built by a MambaLayer.

    Args:
        config: Megatron's config; params_dtype is the dtype of all parameters but A_log and D, which are float32.
        submodules: the projections.
        d_model: hidden size.
        mixer_config: the dimensions, or a function that derives them from `config` (presets for --spec).
        pg_collection: its `tp` group is the one the mixer is cut over.

    Raises:
        UserError: d_inner cannot be shared by the group's ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Mamba1MixerSubmodules,
        d_model: int,
        mixer_config: Mamba1Config | Callable[[TransformerConfig], Mamba1Config],
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        dims = mixer_config if isinstance(mixer_config, Mamba1Config) else mixer_config(config)
        super().__init__(config, mamba1_parameters(dims, d_model), layer_number, pg_collection, pp_layer_offset)
        self.dims = dims
        self._build_projections(submodules, d_model, name)
        self._build_parameters(self.in_proj.weight.device)
        if config.perform_initialization:
            initialize_mamba1(dict(self.named_parameters()), self.table, self.dims, config, self.tp_group)

    def _build_projections(self, submodules: Mamba1MixerSubmodules, d_model: int, name: str | None) -> None:
        dims, config = self.dims, self.config
        whole_sequence = copy.copy(config)  # x_proj and dt_proj work on the gathered sequence
        whole_sequence.sequence_parallel = False

        def build(child: str, rows_in: int, rows_out: int, child_config: TransformerConfig, **kwargs) -> nn.Module:
            return build_module(
                getattr(submodules, child),
                rows_in,
                rows_out,
                config=child_config,
                is_expert=False,
                tp_group=self.tp_group,
                name=None if name is None else f"{name}.{child}",
                **kwargs,
            )

        column = {"gather_output": False, "init_method": filled_later}
        row = {"input_is_parallel": True}
        xz, bias = 2 * dims.d_inner, dims.proj_bias
        bcdt = dims.dt_rank + 2 * dims.d_state
        self.in_proj = build("in_proj", d_model, xz, config, bias=bias, skip_bias_add=False, **column)
        self.x_proj = build(
            "x_proj",
            dims.d_inner,
            bcdt,
            whole_sequence,
            bias=False,
            skip_bias_add=False,
            init_method=config.init_method,
            **row,
        )
        # dt's bias is added in float32, inside the scan
        self.dt_proj = build(
            "dt_proj", dims.dt_rank, dims.d_inner, whole_sequence, bias=True, skip_bias_add=True, **column
        )
        self.out_proj = build(
            "out_proj",
            dims.d_inner,
            d_model,
            config,
            bias=bias,
            skip_bias_add=True,
            init_method=config.output_layer_init_method,
            **row,
        )
        # Megatron's resharding utilities read this off packed weights.
        self.in_proj.weight.partition_sizes = [dims.d_inner // self.tp_group.size()] * 2

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return state_shapes(self.dims, self.tp_group.size())

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """[l, b, h] -> x [l, b, D/p], and z of the same shape."""
        x, z = self.in_proj(hidden_states)[0].chunk(2, dim=-1)
        return x, (z,)

    def inputs(self, convolved: torch.Tensor, around: Tensors) -> Tensors:
        """x [.., D/p] -> x, dt before bias and softplus [.., D/p], B and C [.., N], z [.., D/p]."""
        bcdt, _ = self.x_proj(convolved)
        dt, bc = bcdt.split([self.dims.dt_rank, 2 * self.dims.d_state], dim=-1)
        B, C = copy_to_tensor_model_parallel_region(bc, group=self.tp_group).chunk(2, dim=-1)
        if self.dims.bcdt_norm_eps is not None:
            dt, B, C = (rms_normalize(t, self.dims.bcdt_norm_eps) for t in (dt, B, C))
        return convolved, self.dt_proj(dt)[0], B, C, *around

    def _scan_arguments(self, tokens: Tensors) -> Tensors:
        x, dt, B, C, z = tokens
        return x, dt, -torch.exp(self.A_log), B, C, self.D, z, self.dt_proj.bias

    def scan(self, tokens: Tensors, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.selective_scan(*self._scan_arguments(tokens), state)

    def ssm_prefill(
        self, tokens: Tensors, states: torch.Tensor, slots: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        return ops.selective_scan_varlen(*self._scan_arguments(tokens), states, slots, cu_seqlens)

    def ssm_decode(self, tokens: Tensors, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return ops.selective_state_step(*self._scan_arguments(tokens), states, slots)

    def finish(self, y: torch.Tensor, around: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.out_proj(y)
