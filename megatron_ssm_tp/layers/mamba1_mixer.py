"""The Mamba-1 mixer with tensor parallelism (arXiv 2602.21144; HF MambaMixer, FalconMambaMixer, ZambaMambaMixer).

Shape ledger on one of p ranks, T tokens, h = hidden, D = d_inner, N = d_state, R = dt_rank:

    in_proj    column-parallel   [T, h]   -> x, z [T, D/p] each      no communication
    conv1d     depthwise         [T, D/p] -> [T, D/p]
    x_proj     row-parallel      [T, D/p] -> dt, B, C [T, R + 2N]    all-reduce 1: R + 2N values a token
    norms      (Falcon-Mamba)    after the reduction, where dt, B and C are whole
    dt_proj    column-parallel   [T, R]   -> [T, D/p]                no communication
    scan       A_log, D, state   [T, D/p] -> [T, D/p]                state never crosses ranks
    out_proj   row-parallel      [T, D/p] -> [T, h]                  all-reduce 2: h values a token

Zamba's mixer has H heads: runs of D / H channels with rows of x_proj, and so dt, B and C, of their own. At p <= H whole
heads lie on ranks and x_proj reduces nothing; at p > H its reduction is among the p / H ranks that share a head.

Backward mirrors it: B and C are replicated but feed rank-local channels, so their gradients are summed over the ranks
(copy_to_tensor_model_parallel_region); dt's are summed by dt_proj's own input gradient, x's by in_proj's.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ..config import Mamba1Config
from ..ops import dt_step
from ..ops.bcdt import split_bcdt
from ..partition.layout import state_shapes
from ..partition.parameters import mamba1_parameters
from .initialization import filled_later, initialize_mamba1
from .lean_linear import LeanColumnParallelLinear, is_lean
from .mixer import Packed, SSMMixer, Tensors
from .row_parallel import partial_product, product_in_parts, reduce_partial
from .sharding import sharers
from .side_stream import SideStream


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
        ops: who computes convolution and scan, see ops/choose.py.

    Raises:
        UserError: d_inner cannot be shared by the group's ranks.
    """

    z_behind_from: int | None = None  # tokens from which on z's half of in_proj is made while x_proj's sums travel

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
        ops: str = "auto",
    ) -> None:
        dims = mixer_config if isinstance(mixer_config, Mamba1Config) else mixer_config(config)
        super().__init__(config, mamba1_parameters(dims, d_model), layer_number, pg_collection, pp_layer_offset, ops)
        self.dims = dims
        self.head_group = sharers(self.tp_group, dims.n_heads)  # those that x_proj's product is summed over
        self.heads = max(1, dims.n_heads // self.tp_group.size())
        self.in_proj = self.column_linear(submodules.in_proj, "in_proj", name)
        self._build_x_and_dt(submodules, name)
        self.out_proj = self.row_linear(submodules.out_proj, "out_proj", name)
        # Megatron's resharding utilities read this off packed weights.
        self.in_proj.weight.partition_sizes = [dims.d_inner // self.tp_group.size()] * 2
        self._build_parameters(self.in_proj.weight.device)
        if config.perform_initialization:
            initialize_mamba1(dict(self.named_parameters()), self.table, self.dims, config, self.tp_group)

    def _build_x_and_dt(self, submodules: Mamba1MixerSubmodules, name: str | None) -> None:
        """x_proj and dt_proj, over the ranks that share a head; they work on the gathered sequence."""
        if self.head_group is None and self.dims.n_heads > 1:
            self.x_proj = _HeadsLinear(self, "x_proj.weight")
            self.dt_proj = _HeadsLinear(self, "dt_proj.weight", "dt_proj.bias")
            return
        whole_sequence = copy.copy(self.config)
        whole_sequence.sequence_parallel = False
        channels = self.dims.d_inner // self.dims.n_heads
        common = {"config": whole_sequence, "tp_group": self.head_group or self.tp_group}
        x = {"columns": channels, "skip_bias_add": False, "init_method": filled_later}
        self.x_proj = self.row_linear(submodules.x_proj, "x_proj", name, **x, **common)
        # dt's bias is added in float32, inside the scan
        self.dt_proj = self.column_linear(
            submodules.dt_proj, "dt_proj", name, rows=channels, skip_bias_add=True, **common
        )

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return state_shapes(self.dims, self.tp_group.size())

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """[l, b, h] -> x [l, b, D/p], and z of the same shape, or what it is to be made of later."""
        if self._z_waits(hidden_states):
            of_x, of_z = self.in_proj.weight.chunk(2)
            return F.linear(hidden_states, of_x), _LaterZ(hidden_states, of_z)
        x, z = self.in_proj(hidden_states)[0].chunk(2, dim=-1)
        return x, (z,)

    def _z_waits(self, hidden_states: torch.Tensor) -> bool:
        """Whether z is made while x_proj's sums travel, rather than with x."""
        if self.z_behind_from is None or hidden_states.shape[:-1].numel() < self.z_behind_from:
            return False
        reduced = self.head_group is not None and isinstance(self.x_proj, RowParallelLinear)
        return reduced and isinstance(self.in_proj, LeanColumnParallelLinear) and is_lean(self.in_proj)

    def _x_proj_beside_z(self, convolved: torch.Tensor, later: "_LaterZ") -> tuple[torch.Tensor, torch.Tensor]:
        """x_proj's product, summed over the ranks on a stream of its own, and z."""
        side, partial = SideStream(convolved.device), partial_product(self.x_proj, convolved)
        with side.behind_current():
            bcdt = reduce_partial(self.x_proj, partial)
        made = side.made()
        z = F.linear(*later)
        if made is not None:
            made.wait()
            bcdt.record_stream(torch.cuda.current_stream(bcdt.device))
        return bcdt, z

    def inputs(self, convolved: torch.Tensor, around: Tensors) -> Tensors:
        """x [.., D/p] -> x, dt before bias and softplus [.., D/p], B and C [.., N] or [.., heads here, N], z [.., D/p].

        Without heads of their own, ranks hold the whole of dt, B and C after x_proj's reduction.
        """
        dims = self.dims
        if isinstance(around, _LaterZ):
            bcdt, *around = self._x_proj_beside_z(convolved, around)
            parts = bcdt[None]
        elif isinstance(self.x_proj, _HeadsLinear):
            parts = torch.einsum("...hd,rhd->...hr", _by_head(convolved, self.heads), self.x_proj.by_head(1))[None]
        else:
            parts = product_in_parts(self.x_proj, convolved)
        dt, bc = split_bcdt(parts, dims.dt_rank, dims.d_state, dims.bcdt_norm_eps, convolved.dtype)
        if self.head_group is not None and torch.is_grad_enabled():
            bc = copy_to_tensor_model_parallel_region(bc, group=self.head_group)
        B, C = bc.chunk(2, dim=-1)
        if isinstance(self.dt_proj, _HeadsLinear):
            dt = torch.einsum("...hr,hdr->...hd", dt, self.dt_proj.by_head(0)).flatten(-2)
        else:
            dt = self.dt_proj(dt)[0]
        return convolved, dt, B, C, *around

    def _scan_arguments(self, tokens: Tensors) -> Tensors:
        x, dt, B, C, z = tokens
        return x, dt, self.decay_rates(), B, C, self.D, z, self.dt_proj.bias

    def scan(self, tokens: Tensors, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ops.selective_scan(*self._scan_arguments(tokens), state)

    def ssm_prefill(self, tokens: Tensors, packed: Packed) -> torch.Tensor:
        *where, longest = packed
        return self.ops.selective_scan_varlen(*self._scan_arguments(tokens), *where, longest=longest)

    def ssm_decode(self, tokens: Tensors, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return self.ops.selective_state_step(*self._scan_arguments(tokens), states, slots, at_rest=True)

    def step(self, convolved: torch.Tensor, around: Tensors, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """As SSMMixer's; on GPUs few requests take one kernel from x_proj on."""
        dims, few = self.dims, dt_step.fits(convolved.shape[0], self.dims.dt_rank)
        fused = self.ops.name == "triton" and few and not isinstance(around, _LaterZ)
        if dims.n_heads > 1 or not fused or torch.is_grad_enabled():
            return super().step(convolved, around, states, slots)
        bcdt, _ = self.x_proj(convolved)
        tokens = (t.squeeze(1) for t in (bcdt, convolved, around[0]))
        weights = (self.dt_proj.weight, self.decay_rates(), self.D, self.dt_proj.bias)
        y = dt_step.dt_and_step(*tokens, *weights, states, slots, dims.bcdt_norm_eps, at_rest=True)
        return y.unsqueeze(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As PartitionedModule's. Linears of a head have no extra state: at other TP sizes they are other modules."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = (f"{prefix}x_proj._extra_state", f"{prefix}dt_proj._extra_state") if self.dims.n_heads > 1 else ()
        return {key: value for key, value in found.items() if key not in own}

    def finish(self, y: torch.Tensor, around: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.out_proj(y)

    def partial(self, y: torch.Tensor, around: Tensors) -> tuple[torch.Tensor, None]:
        return partial_product(self.out_proj, y), None


class _LaterZ(NamedTuple):
    """What z [l, b, D/p] is the product of, in z's place."""

    hidden_states: torch.Tensor  # [l, b, h]
    weight: torch.Tensor  # [D/p, h], in_proj's lower half


def _by_head(channels: torch.Tensor, heads: int) -> torch.Tensor:
    return channels.unflatten(-1, (heads, -1))


class _HeadsLinear(nn.Module):
    """Weight (and bias) of a product that several heads of a rank each make for themselves: no rank needs another."""

    def __init__(self, mixer: Mamba1Mixer, weight: str, bias: str | None = None) -> None:
        super().__init__()
        self.heads = mixer.heads
        for attribute, name in (("weight", weight), ("bias", bias)):
            if name:
                setattr(self, attribute, mixer.new_parameter(name, mixer.in_proj.weight.device))

    def by_head(self, axis: int) -> torch.Tensor:
        """The weight with its axis of channels parted: [heads here, channels of one]."""
        return self.weight.unflatten(axis, (self.heads, -1))
