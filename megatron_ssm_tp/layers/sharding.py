"""Distributed checkpoints of modules whose parameters are cut by band."""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn

from ..partition.bands import Band
from ..partition.layout import Parameter


def sum_over_holders(piece: torch.Tensor, band: Band, tp_group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of `piece` over the ranks that hold the same elements of a shared band (a slot for each of its atoms)."""
    tp, rank = tp_group.size(), tp_group.rank()
    slot = rank * band.atoms // tp
    sums = piece.new_zeros(band.atoms, *piece.shape)
    sums[slot] = piece
    dist.all_reduce(sums, group=tp_group)
    return sums[slot]


def sharded_by_band(
    module: nn.Module,
    table: Mapping[str, Parameter],
    tp_group: dist.ProcessGroup,
    prefix: str,
    sharded_offsets: tuple,
    metadata: dict | None,
) -> dict:
    """The sharded state dict of `module` and its children.

    Own parameters are sharded along the axis that `table` gives. Tensors of several bands are stored a band at a time
    (`in_proj.weight.x`): their pieces of one rank lie apart in the whole tensor, and change with the number of ranks.
    A band that several ranks hold is stored once.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    own: dict = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    sharded = make_sharded_tensors_for_checkpoint(
        own,
        prefix,
        tensor_parallel_layers_axis_map={name: table[name].axis for name in own},
        sharded_offsets=sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    for name, child in module.named_children():
        sharded |= sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group)
    for name, parameter in table.items():
        if parameter.packing and len(parameter.packing.bands) > 1:
            key = f"{prefix}{name}"
            sharded[key] = _split(sharded[key], parameter, tp_group)
    return sharded


def _split(whole: ShardedTensor, parameter: Parameter, tp_group: dist.ProcessGroup) -> ShardedTensorFactory:
    tp, axis = tp_group.size(), parameter.axis
    bands = parameter.packing.bands
    sizes = [band.local_size(tp) for band in bands]

    def build(key: str, tensor: torch.Tensor, replica_id: tuple, flattened_range: slice | None) -> list[ShardedTensor]:
        pieces = torch.split(tensor, sizes, dim=axis)
        return [
            _piece(f"{key}.{band.name}", piece, band, axis, replica_id, tp_group)
            for band, piece in zip(bands, pieces, strict=True)
        ]

    return ShardedTensorFactory(
        whole.key, whole.data, build, lambda pieces: torch.cat(pieces, dim=axis), whole.replica_id
    )


def _piece(
    key: str, data: torch.Tensor, band: Band, axis: int, replica_id: tuple, tp_group: dist.ProcessGroup
) -> ShardedTensor:
    """One rank's piece of a band. Where ranks share it, the first of them stores it: the others are its replicas."""
    tp, rank = tp_group.size(), tp_group.rank()
    owners = min(tp, band.atoms)
    copies = tp // owners
    sharded = ShardedTensor.from_rank_offsets(key, data, (axis, rank // copies, owners), replica_id=replica_id)
    if copies == 1:
        return sharded
    first, _, data_parallel = replica_id
    return replace(sharded, replica_id=(first, rank % copies, data_parallel))
