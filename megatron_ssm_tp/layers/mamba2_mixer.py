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
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from ..config import Mamba2Config
from ..errors import UserError
from ..ops import ssd_reference as ops
from ..partition.bands import Band
from ..partition.layout import mamba2_parameters, state_shapes
from .gated_norm import GatedRMSNorm, NormCase, normed_row_parallel
from .initialization import filled_later, initialize_mamba2
from .mixer import SSMMixer, Tensors
from .sharding import sum_over_holders


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
    ) -> None:
        dims = mixer_config if isinstance(mixer_config, Mamba2Config) else mixer_config(config)
        super().__init__(config, mamba2_parameters(dims, d_model), layer_number, pg_collection, pp_layer_offset)
        self.dims, tp = dims, self.tp_group.size()
        common = {"bias": dims.proj_bias, "is_expert": False, "tp_group": self.tp_group, "config": config}
        bands = self.table["in_proj.weight"].packing.bands
        self._sizes = [band.local_size(tp) for band in bands]
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            tp * sum(self._sizes),
            init_method=filled_later,
            gather_output=False,
            skip_bias_add=False,
            name=None if name is None else f"{name}.in_proj",
            **common,
        )
        self.in_proj.weight.partition_sizes = self._sizes  # read by Megatron's resharding utilities
        self.out_proj = build_module(
            submodules.out_proj,
            dims.d_inner,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            name=None if name is None else f"{name}.out_proj",
            **common,
        )
        device = self.in_proj.weight.device
        self._build_parameters(device)
        self.norm = None
        if dims.norm:
            self.norm = GatedRMSNorm(dims.norm, dims.d_inner, self.tp_group, config.params_dtype, device, exact_norm)
        self._sum_gradients_of_shared_groups()
        if config.perform_initialization:
            initialize_mamba2(dict(self.named_parameters()), self.table, dims, config, self.tp_group)

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return state_shapes(self.dims, self.tp_group.size())

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """[l, b, h] -> x, B and C side by side [l, b, D/p + 2 g N], and z [l, b, D/p], dt [l, b, H/p]."""
        z, x, B, C, dt = self.in_proj(hidden_states)[0].split(self._sizes, dim=-1)
        return torch.cat([x, B, C], dim=-1), (z, dt)

    def _sum_gradients_of_shared_groups(self) -> None:
        tp = self.tp_group.size()
        for name, parameter in self.table.items():
            bands = parameter.packing.bands if parameter.packing else ()
            if any(band.is_shared(tp) for band in bands):
                if self.config.gradient_accumulation_fusion:
                    legal = f"False where {tp} ranks share {self.dims.n_groups} groups"
                    raise UserError("gradient_accumulation_fusion", True, "goes past the sum of their gradients", legal)
                self.get_parameter(name).register_hook(partial(self._with_shared_rows_summed, bands))

    def _with_shared_rows_summed(self, bands: tuple[Band, ...], gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of one parameter, its rows of shared bands summed over the ranks that hold the same."""
        tp = self.tp_group.size()
        pieces = gradient.split([band.local_size(tp) for band in bands])
        return torch.cat(
            [
                sum_over_holders(piece, band, self.tp_group) if band.is_shared(tp) else piece
                for band, piece in zip(bands, pieces, strict=True)
            ]
        )

    def inputs(self, convolved: torch.Tensor, around: Tensors) -> Tensors:
        """x [.., D/p], dt [.., H/p], B and C [.., g N]."""
        _, x_size, b_size, c_size, _ = self._sizes
        x, B, C = convolved.split([x_size, b_size, c_size], dim=-1)
        return x, around[1], B, C

    def _scan_arguments(self, tokens: Tensors) -> tuple:
        x, dt, B, C = tokens
        x = x.unflatten(-1, (-1, self.dims.head_dim))
        B, C = (t.unflatten(-1, (-1, self.dims.d_state)) for t in (B, C))
        return x, dt, -torch.exp(self.A_log), B, C, self.D, self.dt_bias, self.dims.dt_limit

    def scan(self, tokens: Tensors, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = ops.ssd(*self._scan_arguments(tokens), state)
        return y.flatten(-2), state

    def ssm_prefill(
        self, tokens: Tensors, states: torch.Tensor, slots: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        return ops.ssd_varlen(*self._scan_arguments(tokens), states, slots, cu_seqlens).flatten(-2)

    def ssm_decode(self, tokens: Tensors, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return ops.ssd_step(*self._scan_arguments(tokens), states, slots).flatten(-2)

    def finish(self, y: torch.Tensor, around: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        z = around[0]
        if self.norm is None:
            return self.out_proj((y.float() * torch.nn.functional.silu(z.float())).to(y.dtype))
        if self.norm.case is NormCase.DEFERRED:
            sequence_parallel = self.config.sequence_parallel
            return normed_row_parallel(self.norm, y, z, self.out_proj.weight, sequence_parallel), self.out_proj.bias
        return self.out_proj(self.norm(y, z))
