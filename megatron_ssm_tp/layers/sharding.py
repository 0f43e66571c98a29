"""Parameters that are cut by band: their distributed checkpoints, and what ranks that share a part owe each other."""

from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

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

from ..partition.bands import Band, Packing, Uneven
from ..partition.parameters import Parameter

# A group is made once for each tensor-parallel group and number of parts, for all layers.
_sharers: WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]] = WeakKeyDictionary()


def sharers(tp_group: dist.ProcessGroup, parts: int) -> dist.ProcessGroup | None:
    """The ranks that hold one of `parts` equal parts together with this one: neighbours, tp / parts of them.

    None where this rank holds whole parts. The first call for a number of parts is collective over the group.
    """
    tp, rank = tp_group.size(), tp_group.rank()
    if parts >= tp:
        return None
    if parts == 1:
        return tp_group
    known = _sharers.setdefault(tp_group, {})
    if parts not in known:
        count = tp // parts
        first = rank // count * count
        members = dist.get_process_group_ranks(tp_group)[first : first + count]
        known[parts] = dist.new_group(members, use_local_synchronization=True)
    return known[parts]


def sum_over_holders(piece: torch.Tensor, band: Band, tp_group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of `piece` over the ranks that hold the same elements of a shared band."""
    total = piece.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=sharers(tp_group, band.atoms))
    return total


def sharded_by_band(
    module: nn.Module,
    table: Mapping[str, Parameter],
    tp_group: dist.ProcessGroup,
    prefix: str,
    sharded_offsets: tuple,
    metadata: dict | None,
) -> dict:
    """The sharded state dict of `module` and its children.

    Parameters are sharded along the axis that `table` gives. Tensors of several bands are stored a band at a time
    (`in_proj.weight.x`): their pieces of one rank lie apart in the whole tensor, and change with the number of ranks.
    A band that several ranks hold is stored once.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    sharded: dict = {}
    for name, child in module.named_children():
        sharded |= sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group)
    # Children know neither bands nor, where they work in a part of the ranks, the whole tensor: the table does.
    values = dict(module.named_parameters())
    sharded |= make_sharded_tensors_for_checkpoint(
        {name: values[name] for name in table},
        prefix,
        tensor_parallel_layers_axis_map={name: p.axis for name, p in table.items() if p.packing},
        sharded_offsets=sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    for name, parameter in table.items():
        if parameter.packing and _stored_by_band(parameter.packing):
            key = f"{prefix}{name}"
            sharded[key] = _split(sharded[key], parameter, tp_group)
    return sharded


def _stored_by_band(packing: Packing) -> bool:
    """The same at every number of ranks, or a checkpoint of one would not be found by another."""
    return len(packing.bands) > 1 or packing.bands[0].uneven is Uneven.REPLICATE


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
