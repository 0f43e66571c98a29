"""The Mamba-2 mixer at any TP size (arXiv 2405.21060; HF Mamba2Mixer).

Shape ledger on one of p ranks, T tokens, H heads of P channels, D = H P, G groups, N = d_state, g = max(1, G/p) groups
here. Megatron asserts G % p == 0; where instead p % G == 0 each rank keeps a copy of the one group that its heads use.

    in_proj    column-parallel   [T, h]   -> z, x [T, D/p]; B, C [T, g N]; dt [T, H/p]     no communication
    conv1d     depthwise         [T, D/p + 2 g N] -> the same
    SSD        A_log, D, dt_bias, state  x [T, H/p, P] -> [T, H/p, P]                      state never crosses ranks
    norm       gated, see gated_norm
    out_proj   row-parallel      [T, D/p] -> [T, h]                                       all-reduce: h values a token

Backward: ranks that share a group hold the same rows of B and C, but each sees its own heads' gradient only. The
input's gradient is summed over ranks by in_proj, so it wants these parts; the rows want their sum, which hooks on the
parameters make.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ..config import Mamba2Config
from ..ops import ssd_reference
from ..partition.layout import state_shapes
from ..partition.parameters import mamba2_parameters
from .gated_norm import GatedRMSNorm, NormCase
from .initialization import initialize_mamba2
from .mixer import Packed, SSMMixer, Tensors
from .row_parallel import partial_product, reduce_partial


@dataclass
class Mamba2MixerSubmodules:
    """Megatron's ColumnParallelLinear (in) and RowParallelLinear (out), or their likes."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class Mamba2Mixer(SSMMixer):
    """One Mamba-2 mixer, built by a MambaLayer.

    Args:
        config: Megatron's config; params_dtype is the dtype of all parameters but A_log and D, which are float32.
        submodules: the projections.
        d_model: hidden size.
        mixer_config: the dimensions, or a function that derives them from `config`.
        pg_collection: its `tp` group is the one the mixer is cut over.
        exact_norm: reduce a spanning norm's sums before out_proj, instead of along with it.
        ops: who computes the convolution, and with a dynamic context the scan, see ops/choose.py.

    Raises:
        UserError: heads or groups cannot be shared by the group's ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Mamba2MixerSubmodules,
        d_model: int,
        mixer_config: Mamba2Config | Callable[[TransformerConfig], Mamba2Config],
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,
        exact_norm: bool = False,
        ops: str = "auto",
    ) -> None:
        dims = mixer_config if isinstance(mixer_config, Mamba2Config) else mixer_config(config)
        super().__init__(config, mamba2_parameters(dims, d_model), layer_number, pg_collection, pp_layer_offset, ops)
        self.dims = dims
        self.in_proj = self.column_linear(submodules.in_proj, "in_proj", name)
        self.out_proj = self.row_linear(submodules.out_proj, "out_proj", name)
        self._sizes = self.in_proj.weight.partition_sizes = self.local_sizes("in_proj.weight")
        device = self.in_proj.weight.device
        self._build_parameters(device)
        self.norm = None
        if dims.norm:
            self.norm = GatedRMSNorm(dims.norm, dims.d_inner, self.tp_group, config.params_dtype, device, exact_norm)
        self.sum_gradients_of_shared_rows()
        if config.perform_initialization:
            initialize_mamba2(dict(self.named_parameters()), self.table, dims, config, self.tp_group)

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return state_shapes(self.dims, self.tp_group.size())

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """[l, b, h] -> x, B and C side by side [l, b, D/p + 2 g N], and z [l, b, D/p], dt [l, b, H/p]."""
        if self.dims.in_multiplier != 1:
            hidden_states = hidden_states * self.dims.in_multiplier
        bands = self.in_proj(hidden_states)[0]
        if any(multiplier != 1 for multiplier in self.dims.band_multipliers):
            parts = bands.split(self._sizes, dim=-1)
            scaled = zip(parts, self.dims.band_multipliers, strict=True)
            bands = torch.cat([band * multiplier for band, multiplier in scaled], dim=-1)
        z, *xbc, dt = self._sizes
        z, xbc, dt = bands.split([z, sum(xbc), dt], dim=-1)
        return xbc, (z, dt)

    def inputs(self, convolved: torch.Tensor, around: Tensors) -> Tensors:
        """x [.., D/p], dt [.., H/p], B and C [.., g N]."""
        _, x_size, b_size, c_size, _ = self._sizes
        x, B, C = convolved.split([x_size, b_size, c_size], dim=-1)
        return x, around[1], B, C

    def _scan_arguments(self, tokens: Tensors) -> tuple:
        x, dt, B, C = tokens
        x = x.unflatten(-1, (-1, self.dims.head_dim))
        B, C = (t.unflatten(-1, (-1, self.dims.d_state)) for t in (B, C))
        return x, dt, self.decay_rates(), B, C, self.D, self.dt_bias, self.dims.dt_limit

    def scan(self, tokens: Tensors, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = ssd_reference.ssd(*self._scan_arguments(tokens), state)
        return y.flatten(-2), state

    def ssm_prefill(self, tokens: Tensors, packed: Packed) -> torch.Tensor:
        *where, longest = packed
        return self.ops.ssd_varlen(*self._scan_arguments(tokens), *where, longest=longest).flatten(-2)

    def ssm_decode(self, tokens: Tensors, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return self.ops.ssd_step(*self._scan_arguments(tokens), states, slots, at_rest=True).flatten(-2)

    def finish(self, y: torch.Tensor, around: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._norm_rides:
            return self.out_proj(self._gated(y, around[0]))
        return self.summed(*self.partial(y, around)), self.out_proj.bias

    def partial(self, y: torch.Tensor, around: Tensors) -> tuple[torch.Tensor, Callable | None]:
        if not self._norm_rides:
            return partial_product(self.out_proj, self._gated(y, around[0])), None
        return self.norm.packed_product(y, around[0], self.out_proj), self.norm.unpack

    def summed(self, partial: torch.Tensor, complete: Callable | None) -> torch.Tensor:
        if complete is None:
            return super().summed(partial, complete)
        return complete(reduce_partial(self.out_proj, partial, self.norm.columns(partial.dtype)))

    @property
    def last_linear(self) -> nn.Module | None:
        return None if self._norm_rides else self.out_proj

    @property
    def _norm_rides(self) -> bool:
        """Whether the norm is finished after out_proj, with sums that travel in its reduction."""
        return self.norm is not None and self.norm.case is NormCase.DEFERRED

    def _gated(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if self.norm is None:
            return (y.float() * torch.nn.functional.silu(z.float())).to(y.dtype)
        return self.norm(y, z)
