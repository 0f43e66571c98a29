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
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import deprecate_inference_params
from torch import nn

from ..config import Mamba1Config
from ..errors import UserError
from ..ops import reference as ops
from ..partition.layout import mamba1_parameters, state_shapes
from ..partition.plan import check_tp
from .initialization import initialize_mamba1
from .norm import rms_normalize
from .sharding import sharded_by_band

_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
States = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Mamba1MixerSubmodules:
    """The four projections: Megatron's ColumnParallelLinear (in, dt) and RowParallelLinear (x, out), or their likes."""

    in_proj: ModuleSpec | type
    x_proj: ModuleSpec | type
    dt_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class Mamba1Mixer(MegatronModule):
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

    chunk_size = 128  # read by MambaInferenceStateConfig.from_model; only prefix caching, which is refused, acts on it

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
        super().__init__(config)
        dims = mixer_config if isinstance(mixer_config, Mamba1Config) else mixer_config(config)
        self.dims, self.layer_number, self.pp_layer_offset = dims, layer_number, pp_layer_offset
        self.tp_group = pg_collection.tp
        self.table = mamba1_parameters(dims, d_model)
        check_tp((parameter.packing for parameter in self.table.values() if parameter.packing), self.tp_group.size())
        self._build_projections(submodules, d_model, name)
        self._build_parameters()
        if config.perform_initialization:
            initialize_mamba1(dict(self.named_parameters()), self.table, dims, config, self.tp_group)

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

        column = {"gather_output": False, "init_method": config.init_method}
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

    def _build_parameters(self) -> None:
        """The parameters that belong to no projection: all cut along their first axis."""
        tp, device = self.tp_group.size(), self.in_proj.weight.device
        own = {name: p for name, p in self.table.items() if name.split(".")[0] not in _PROJECTIONS}
        for name, parameter in own.items():
            dtype = torch.float32 if parameter.keep_fp32 else self.config.params_dtype
            value = nn.Parameter(torch.zeros(parameter.local_shape(tp), device=device, dtype=dtype))
            value.tensor_model_parallel, value.partition_dim, value.partition_stride = True, parameter.axis, 1
            self.register_parameter(name, value)
        if not self.dims.conv_bias:
            self.register_parameter("conv1d_bias", None)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Mamba1Mixer":
        """Keep A_log and D in float32 when the module is cast, as Megatron's Float16Module does to everything."""
        kept = {name: getattr(self, name).data for name, p in self.table.items() if p.keep_fp32}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        return self

    # Forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: BaseInferenceContext | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
        packed_seq_params: object | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [l, b, h], or [l/p, b, h] under sequence parallelism -> the same shape, and out_proj's bias.

        With an inference context b is 1 under dynamic batching (l packed tokens) and the batch under static.
        """
        context = deprecate_inference_params(inference_context, inference_params)
        if packed_seq_params is not None:
            raise UserError("packed_seq_params", "given", "is not implemented by the Mamba-1 mixer", "None")
        xz, _ = self.in_proj(hidden_states)
        x, z = xz.chunk(2, dim=-1)
        if context is None or not InferenceMode.is_active():
            y = self._dense(x, z)
        elif context.is_dynamic_batching():
            y = self._dynamic(x.squeeze(1), z.squeeze(1), context).unsqueeze(1)
        else:
            y = self._static(x, z, context)
        return self.out_proj(y)

    def _bcdt(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [..., D/p] -> dt [..., D/p] before bias and softplus, B and C [..., N]."""
        bcdt, _ = self.x_proj(x)
        dt, bc = bcdt.split([self.dims.dt_rank, 2 * self.dims.d_state], dim=-1)
        B, C = copy_to_tensor_model_parallel_region(bc, group=self.tp_group).chunk(2, dim=-1)
        if self.dims.bcdt_norm_eps is not None:
            dt, B, C = (rms_normalize(t, self.dims.bcdt_norm_eps) for t in (dt, B, C))
        return self.dt_proj(dt)[0], B, C

    @property
    def _A(self) -> torch.Tensor:
        return -torch.exp(self.A_log)

    @property
    def _conv(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.conv1d_weight.squeeze(1), self.conv1d_bias

    def _dense_states(self, x: torch.Tensor, z: torch.Tensor, states: States | None) -> tuple[torch.Tensor, States]:
        x, z = x.transpose(0, 1), z.transpose(0, 1)
        conv_state, ssm_state = states or (None, None)
        x, conv_state = ops.causal_conv1d(x, *self._conv, conv_state)
        dt, B, C = self._bcdt(x)
        y, ssm_state = ops.selective_scan(x, dt, self._A, B, C, self.D, z, self.dt_proj.bias, ssm_state)
        return y.transpose(0, 1).contiguous(), (conv_state, ssm_state)

    def _dense(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Training and plain evaluation: x, z [l, b, D/p], every row from an empty state."""
        return self._dense_states(x, z, None)[0]

    # Static batching: Megatron's StaticInferenceContext, all rows at one offset

    def _static(self, x: torch.Tensor, z: torch.Tensor, context: BaseInferenceContext) -> torch.Tensor:
        cache, batch = context.key_value_memory_dict, x.shape[1]
        fresh = context.sequence_len_offset == 0
        y, states = self._dense_states(x, z, None if fresh else cache[self.layer_number])
        if fresh:
            cache[self.layer_number] = self.allocate_inference_cache(batch)
        for kept, new in zip(cache[self.layer_number], states, strict=True):
            kept.copy_(new)
        return y

    def allocate_inference_cache(self, batch_size: int, ssm_dtype: torch.dtype = torch.float32) -> States:
        """Zero states for static batching: conv [b, D/p, K] in the model's dtype and ssm [b, D/p, N] in `ssm_dtype`."""
        conv, ssm = self.mamba_state_shapes_per_request()
        weight = self.conv1d_weight
        return weight.new_zeros(batch_size, *conv), weight.new_zeros(batch_size, *ssm, dtype=ssm_dtype)

    # Dynamic batching: decode tokens first, then packed prompts, each with a slot of the context's state cache

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return state_shapes(self.dims, self.tp_group.size())

    def _dynamic(self, x: torch.Tensor, z: torch.Tensor, context: BaseInferenceContext) -> torch.Tensor:
        """x, z [padded tokens, D/p] -> y of the same shape, zero for padding.

        Convolution and scan differ between decode and prefill; the projections between them take all tokens at once,
        so that a mixed step pays no more all-reduces than a pure one.
        """
        _refuse_unsupported(context)
        conv_states, ssm_states = context.mamba_states_cache(self.layer_number - self.pp_layer_offset)
        metadata, batch = context.mamba_metadata, context.batch_dimensions
        decodes, prefills, tokens = batch.decode_req_count, batch.prefill_req_count, batch.token_count
        decode, prefill = slice(0, decodes), slice(decodes, tokens)
        x_conv = torch.zeros_like(x)
        if decodes:
            decode_slots = metadata.batch_indices_decode[:decodes].long()
            x_conv[decode] = ops.causal_conv1d_step(x[decode], *self._conv, conv_states, decode_slots)
        if prefills:
            prefill_slots = metadata.batch_indices_prefill[:prefills].long()
            cu_seqlens = metadata.cu_seqlens[: prefills + 1]
            x_conv[prefill] = ops.causal_conv1d_varlen(x[prefill], *self._conv, conv_states, prefill_slots, cu_seqlens)
        dt, B, C = (t.squeeze(1) for t in self._bcdt(x_conv.unsqueeze(1)))
        y = torch.zeros_like(x)
        if decodes:
            tokens_in = (t[decode] for t in (x_conv, dt, B, C, z))
            y[decode] = self.ssm_decode(*tokens_in, ssm_states, decode_slots)
        if prefills:
            tokens_in = (t[prefill] for t in (x_conv, dt, B, C, z))
            y[prefill] = self.ssm_prefill(*tokens_in, ssm_states, prefill_slots, cu_seqlens)
        return y

    def ssm_decode(self, x, dt, B, C, z, states, slots) -> torch.Tensor:
        """One token a request: x, dt, z [s, D/p], B, C [s, N]; states [slots, D/p, N] updated in place."""
        return ops.selective_state_step(x, dt, self._A, B, C, self.D, z, self.dt_proj.bias, states, slots)

    def ssm_prefill(self, x, dt, B, C, z, states, slots, cu_seqlens) -> torch.Tensor:
        """Packed prompts or parts of them: x, dt, z [T, D/p], B, C [T, N]; states from and into the slots."""
        return ops.selective_scan_varlen(x, dt, self._A, B, C, self.D, z, self.dt_proj.bias, states, slots, cu_seqlens)

    # Distributed checkpoints

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state dict; in_proj is stored by band (`in_proj.weight.x`, `.z`): any TP can load it."""
        return sharded_by_band(self, self.table, self.tp_group, prefix, sharded_offsets, metadata)


def _refuse_unsupported(context: BaseInferenceContext) -> None:
    """Prefix caching and speculation need states in the middle of a prompt; without them results would be wrong."""
    if context.mamba_slot_allocator is not None:
        raise UserError("enable_prefix_caching", True, "is not implemented by the Mamba-1 mixer", "False")
    if context.num_speculative_tokens:
        raise UserError("num_speculative_tokens", context.num_speculative_tokens, "is not implemented", "0")
