"""The gated RMS norm between a Mamba-2 scan and out_proj, where its width may span ranks.

A norm over channels that several ranks hold needs the sum of their squares. Its scale is one number a token, so it
commutes with out_proj: multiply un-normalized, let each rank's sum of squares travel in the all-reduce that out_proj
pays anyway, and scale the sum. No second all-reduce. Three cases, by the norm's groups and p ranks:

    local      groups % p == 0           each rank's groups are whole: norm, then out_proj
    deferred   groups == 1 < p           as above; the sums of squares ride along
    reduced    otherwise, or on demand   the sums of squares are reduced first, one number a token among the ranks that
                                         share a group: exact, one small all-reduce more

With w the norm's weight and s = silu(z): after the gate  u = y s, out = scale(u) W (w u);  before it
out = scale(y) W (w y s).
Source of the norms: HF MambaRMSNormGated, Zamba2RMSNormGated, FalconH1RMSNormGated.
"""

from enum import Enum

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import _reduce as all_reduce_in_place
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn

from ..config import GatedNormConfig
from ..errors import UserError
from ..partition.reductions import sum_columns
from .row_parallel import partial_product
from .sharding import sharers


class NormCase(Enum):
    LOCAL = "local"
    DEFERRED = "deferred"
    REDUCED = "reduced"


def norm_case(groups: int, tp: int, dtype: torch.dtype, exact: bool = False) -> NormCase:
    """Which case holds. float16 is never deferred: what is not yet normalized may exceed its range.

    Raises:
        UserError: a rank would hold parts of several groups.
    """
    if groups % tp == 0:
        return NormCase.LOCAL
    if tp % groups:
        legal = f"divisors and multiples of {groups}"
        raise UserError("tensor_model_parallel_size", tp, f"does not go with a norm of {groups} groups", legal)
    if groups == 1 and not exact and dtype != torch.float16:
        return NormCase.DEFERRED
    return NormCase.REDUCED


class GatedRMSNorm(nn.Module):
    """Weight [d_inner / p] and the arithmetic of one rank's channels.

    Args:
        config: epsilon, groups of the whole norm, order of norm and gate.
        d_inner: channels of all ranks together.
    """

    def __init__(
        self,
        config: GatedNormConfig,
        d_inner: int,
        tp_group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        self.width = d_inner // config.groups
        self.case = norm_case(config.groups, tp_group.size(), dtype, exact)
        self.group_ranks = sharers(tp_group, config.groups) if self.case is NormCase.REDUCED else None
        self.weight = nn.Parameter(torch.ones(d_inner // tp_group.size(), dtype=dtype, device=device))
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, 0, 1

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            tensor_parallel_layers_axis_map={"weight": 0},
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )

    def gated(self, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is to be scaled [.., D/p] without its weight, and what its scale is taken of; both float32."""
        y, gate = y.float(), F.silu(z.float())
        return (y * gate, y) if self.config.before_gate else (y * gate, y * gate)

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Normed and gated [.., D/p] in y's dtype; LOCAL and REDUCED only."""
        value, measured = self.gated(y, z)
        if self.case is NormCase.LOCAL:
            groups = value.shape[-1] // self.width
            mean = measured.unflatten(-1, (groups, self.width)).pow(2).mean(-1, keepdim=True)
            scale = torch.rsqrt(mean + self.config.eps)
            normed = (value.unflatten(-1, (groups, self.width)) * scale).flatten(-2)
        else:
            normed = value * torch.rsqrt(self._reduced_mean(measured) + self.config.eps)
        return self.weight * normed.to(y.dtype)

    def _reduced_mean(self, measured: torch.Tensor) -> torch.Tensor:
        """Mean square [.., 1] of this rank's group, over the ranks that share it."""
        return _SumOverRanks.apply(measured.pow(2).sum(-1, keepdim=True), self.group_ranks) / self.width

    def columns(self, dtype: torch.dtype) -> int:
        """DEFERRED: how many columns carry sums of squares beside a product of `dtype`."""
        return sum_columns(_dtype_name(dtype), self.tp_group.size())

    def packed_product(self, y: torch.Tensor, z: torch.Tensor, out_proj: RowParallelLinear) -> torch.Tensor:
        """DEFERRED: this rank's part of the unscaled product, its sums of squares beside it: [l, b, h + columns]."""
        value, measured = self.gated(y, z)
        product = partial_product(out_proj, self.weight * value.to(y.dtype))
        squares = measured.pow(2).sum(-1, keepdim=True) / self.width
        return torch.cat([product, _pack(squares, product.dtype, self.tp_group)], dim=-1)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """DEFERRED: the product [.., h] of the reduced `packed_product`."""
        columns = self.columns(packed.dtype)
        product, sums = packed.split([packed.shape[-1] - columns, columns], dim=-1)
        mean = sums.float().sum(-1, keepdim=True)
        return (product.float() * torch.rsqrt(mean + self.config.eps)).to(packed.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: what is summed here scales channels that differ from rank to rank."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_reduce_in_place(x.clone(), group)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce_in_place(gradient.clone(), ctx.group), None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pack(numbers: torch.Tensor, dtype: torch.dtype, group: dist.ProcessGroup) -> torch.Tensor:
    """float32 numbers [.., 1] as columns of `dtype` that survive a sum over the ranks (see reductions.sum_columns)."""
    if dtype == torch.float32:
        return numbers
    pieces, rest = [], numbers
    for _ in range(3):
        piece = rest.to(dtype)
        rest = rest - piece.float()
        pieces.append(piece)
    tp, own = group.size(), torch.cat(pieces, dim=-1)
    columns = sum_columns(_dtype_name(dtype), tp)
    return F.pad(own, (3 * group.rank(), columns - 3 * (group.rank() + 1)))
