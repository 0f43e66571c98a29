"""The gated RMS norm between a Mamba-2 scan and out_proj, where its width may span ranks.

A norm over channels that several ranks hold needs the sum of their squares. Its scale is one number a token, so it
commutes with out_proj: multiply un-normalized, let each rank's sum of squares travel in the all-reduce that out_proj
pays anyway, and scale the sum. No second all-reduce. Three cases, by the norm's groups and p ranks:

    local      groups % p == 0           each rank's groups are whole: norm, then out_proj
    deferred   groups == 1 < p           as above; the sums of squares ride along
    reduced    otherwise, or on demand   the sums of squares are reduced first: exact, one small all-reduce more

With w the norm's weight and s = silu(z): after the gate  u = y s, out = scale(u) W (w u);  before it
out = scale(y) W (w y s).
Source of the norms: HF MambaRMSNormGated, Zamba2RMSNormGated, FalconH1RMSNormGated.
"""

from enum import Enum

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import _reduce as all_reduce_in_place
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn

from ..config import GatedNormConfig
from ..errors import UserError
from ..partition.layout import sum_columns


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
        """Mean square [.., 1] of this rank's group over the ranks that share it: a slot a group, all ranks reducing."""
        slot = self.tp_group.rank() * self.config.groups // self.tp_group.size()
        sums = F.one_hot(torch.tensor(slot, device=measured.device), self.config.groups).float()
        sums = measured.pow(2).sum(-1, keepdim=True) * sums
        return _SumOverRanks.apply(sums, self.tp_group)[..., slot : slot + 1] / self.width


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: what is summed here scales channels that differ from rank to rank."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_reduce_in_place(x.clone(), group)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce_in_place(gradient.clone(), ctx.group), None


def normed_row_parallel(
    norm: GatedRMSNorm, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, sequence_parallel: bool
) -> torch.Tensor:
    """DEFERRED: norm, gate and row-parallel product in one reduction.

    Args:
        y, z: [l, b, D/p]. weight: [h, D/p] of out_proj.

    Returns:
        [l, b, h], or [l/p, b, h] under sequence parallelism, in y's dtype.
    """
    value, measured = norm.gated(y, z)
    product = F.linear(norm.weight * value.to(y.dtype), weight)
    squares = measured.pow(2).sum(-1, keepdim=True) / norm.width
    packed = torch.cat([product, _pack(squares, product.dtype, norm.tp_group)], dim=-1)
    reduce = (
        reduce_scatter_to_sequence_parallel_region if sequence_parallel else reduce_from_tensor_model_parallel_region
    )
    packed = reduce(packed, group=norm.tp_group)
    product, columns = packed.split([weight.shape[0], packed.shape[-1] - weight.shape[0]], dim=-1)
    mean = columns.float().sum(-1, keepdim=True)
    return (product.float() * torch.rsqrt(mean + norm.config.eps)).to(y.dtype)


def _pack(numbers: torch.Tensor, dtype: torch.dtype, group: dist.ProcessGroup) -> torch.Tensor:
    """float32 numbers [.., 1] as columns of `dtype` that survive a sum over the ranks (see layout.sum_columns)."""
    if dtype == torch.float32:
        return numbers
    pieces, rest = [], numbers
    for _ in range(3):
        piece = rest.to(dtype)
        rest = rest - piece.float()
        pieces.append(piece)
    tp, own = group.size(), torch.cat(pieces, dim=-1)
    columns = sum_columns(str(dtype).removeprefix("torch."), tp)
    return F.pad(own, (3 * group.rank(), columns - 3 * (group.rank() + 1)))
