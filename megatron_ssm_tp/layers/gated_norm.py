"""The gated RMS norm between a Mamba-2 scan and out_proj, where its width may span ranks.

A norm over channels that several ranks hold needs the sum of their squares. Its scale is one number a token, so it
commutes with out_proj: multiply un-normalized, let each rank's sum of squares travel in the all-reduce that out_proj
pays anyway, and scale the sum. No second all-reduce. Three cases, by the norm's groups and p ranks:

    local      groups % p == 0           each rank's groups are whole: norm, then out_proj
    deferred   groups == 1 < p           as above; the sums of squares ride along
    reduced    otherwise, or on demand   the sums of squares are reduced first, one number a token among the ranks that
                                         share a group: exact, one small all-reduce more

The arithmetic is in ops/gated_norm.py.
"""

from enum import Enum

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import _reduce as all_reduce_in_place
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn

from ..config import GatedNormConfig
from ..errors import UserError
from ..ops.gated_norm import gated, gated_rms_norm, gated_values, pack_sums, unpack_sums
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

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Normed and gated [.., D/p] in y's dtype; LOCAL and REDUCED only."""
        eps, before_gate = self.config.eps, self.config.before_gate
        if self.case is NormCase.LOCAL:
            return gated_rms_norm(y, z, self.weight, eps, y.shape[-1] // self.width, before_gate)
        value, measured = gated(y, z, before_gate)
        mean = _SumOverRanks.apply(measured.pow(2).sum(-1, keepdim=True), self.group_ranks) / self.width
        return self.weight * (value * torch.rsqrt(mean + eps)).to(y.dtype)

    def columns(self, dtype: torch.dtype) -> int:
        """DEFERRED: how many columns carry sums of squares beside a product of `dtype`."""
        return sum_columns(str(dtype).removeprefix("torch."), self.tp_group.size())

    def packed_product(self, y: torch.Tensor, z: torch.Tensor, out_proj: RowParallelLinear) -> torch.Tensor:
        """DEFERRED: this rank's part of the unscaled product, its sums of squares beside it: [l, b, h + columns]."""
        value, squares = gated_values(y, z, self.weight, self.config.before_gate)
        product = partial_product(out_proj, value)
        return pack_sums(product, squares / self.width, self.tp_group.rank(), self.columns(product.dtype))

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """DEFERRED: the product [.., h] of the reduced `packed_product`."""
        return unpack_sums(packed, self.columns(packed.dtype), self.config.eps)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: what is summed here scales channels that differ from rank to rank."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_reduce_in_place(x.clone(), group)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce_in_place(gradient.clone(), ctx.group), None
