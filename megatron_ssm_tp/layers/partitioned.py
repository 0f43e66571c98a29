"""The base of modules whose parameters are cut by a table of `partition.parameters`."""

from functools import partial

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ..errors import UserError
from ..partition.bands import Band
from ..partition.parameters import Parameter, Table
from ..partition.plan import check_tp
from .initialization import filled_later
from .sharding import sharded_by_band, sum_over_holders


class PartitionedModule(MegatronModule):
    """A module with a table of its parameters: it builds linears by it and stores distributed checkpoints by it.

    Args:
        config: Megatron's config.
        table: every parameter by its name in the module.
        tp_group: the ranks that the module is cut over.

    Raises:
        UserError: the table cannot be shared by the group's ranks, or the sequence would be shared too.
    """

    def __init__(self, config: TransformerConfig, table: Table, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config)
        if config.context_parallel_size > 1:
            raise UserError("context_parallel_size", config.context_parallel_size, "is not implemented", "1")
        self.table, self.tp_group = table, tp_group
        check_tp((parameter.packing for parameter in table.values() if parameter.packing), tp_group.size())

    def column_linear(self, spec: ModuleSpec | type, child: str, name: str | None, **kwargs) -> nn.Module:
        """The column-parallel linear of `table[child.weight]`; its initial values are drawn by `initialization`."""
        # Rows that ranks share are counted as often as they are held.
        rows = self.tp_group.size() * sum(self.local_sizes(f"{child}.weight"))
        settings = {"rows": rows, "gather_output": False, "init_method": filled_later}
        return self._linear(spec, child, name, **(settings | kwargs))

    def row_linear(self, spec: ModuleSpec | type, child: str, name: str | None, **kwargs) -> nn.Module:
        """The row-parallel linear of `table[child.weight]`; its bias is returned unadded."""
        settings = {"init_method": self.config.output_layer_init_method, "skip_bias_add": True} | kwargs
        return self._linear(spec, child, name, input_is_parallel=True, **settings)

    def _linear(self, spec: ModuleSpec | type, child: str, name: str | None, **kwargs) -> nn.Module:
        rows, columns = self.table[f"{child}.weight"].shape
        rows, columns = kwargs.pop("rows", rows), kwargs.pop("columns", columns)  # a linear over a part of the ranks
        settings = {
            "config": self.config,
            "bias": f"{child}.bias" in self.table,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": self.tp_group,
            "name": None if name is None else f"{name}.{child}",
        }
        return build_module(spec, columns, rows, **(settings | kwargs))

    def new_parameter(self, name: str, device: torch.device) -> nn.Parameter:
        """This rank's share of `table[name]`, zero, marked as Megatron marks tensor-parallel parameters."""
        parameter = self.table[name]
        dtype = torch.float32 if parameter.keep_fp32 else self.config.params_dtype
        value = nn.Parameter(torch.zeros(parameter.local_shape(self.tp_group.size()), device=device, dtype=dtype))
        value.tensor_model_parallel, value.partition_dim, value.partition_stride = True, parameter.axis, 1
        return value

    def local_sizes(self, name: str) -> list[int]:
        """Elements of each band of `table[name]` on this rank."""
        tp = self.tp_group.size()
        return [band.local_size(tp) for band in self.table[name].packing.bands]

    def sum_gradients_of_shared_rows(self) -> None:
        """Ranks that hold the same rows each see a part of their gradient: sum it, by a hook on the parameter.

        Raises:
            UserError: gradients would go past the hooks.
        """
        tp = self.tp_group.size()
        for name, parameter in self.table.items():
            bands = parameter.packing.bands if parameter.packing else ()
            shared = next((band for band in bands if band.is_shared(tp)), None)
            if shared is None:
                continue
            if self.config.gradient_accumulation_fusion:
                legal = f"False where {tp} ranks share {shared.atoms} {shared.dimension}"
                raise UserError("gradient_accumulation_fusion", True, "goes past the sum of their gradients", legal)
            self.get_parameter(name).register_hook(partial(self._with_shared_rows_summed, parameter))

    def _with_shared_rows_summed(self, parameter: Parameter, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of one parameter, its rows of shared bands summed over the ranks that hold the same."""
        tp = self.tp_group.size()
        bands = parameter.packing.bands

        def summed(piece: torch.Tensor, band: Band) -> torch.Tensor:
            return sum_over_holders(piece, band, self.tp_group) if band.is_shared(tp) else piece

        pieces = gradient.split([band.local_size(tp) for band in bands])
        return torch.cat([summed(piece, band) for piece, band in zip(pieces, bands, strict=True)])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state dict; packed tensors are stored by band (`in_proj.weight.x`), for any TP to load."""
        return sharded_by_band(self, self.table, self.tp_group, prefix, sharded_offsets, metadata)
