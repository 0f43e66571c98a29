"""Distributed checkpoints of modules whose parameters are cut by band."""

from collections.abc import Mapping

import torch.distributed as dist
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn

from ..partition.layout import Parameter


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
        bands = parameter.packing.bands if parameter.packing else ()
        if len(bands) > 1:
            sizes = [band.local_size(tp_group.size()) for band in bands]
            key = f"{prefix}{name}"
            sharded[key] = _split_tensor_factory(sharded[key], sizes, [band.name for band in bands], parameter.axis)
    return sharded
