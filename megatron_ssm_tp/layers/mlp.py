"""Column-parallel up, row-parallel down (HF BambaMLP, FalconH1MLP, Zamba2MLP, NemotronHMLP)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ..config import MLPConfig
from ..partition.parameters import mlp_parameters
from .initialization import draw_all
from .partitioned import PartitionedModule

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass
class MLPSubmodules:
    """Megatron's ColumnParallelLinear (up) and RowParallelLinear (down), or their likes."""

    up: ModuleSpec | type
    down: ModuleSpec | type


class MLP(PartitionedModule):
    """One MLP, as the `mixer` of a layer or inside a shared block; arguments as of the mixers."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        d_model: int,
        mlp_config: MLPConfig | Callable[[TransformerConfig], MLPConfig],
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        dims = mlp_config if isinstance(mlp_config, MLPConfig) else mlp_config(config)
        super().__init__(config, mlp_parameters(dims, d_model), pg_collection.tp)
        self.dims, self.activation = dims, ACTIVATIONS[dims.activation]
        self.up = self.column_linear(submodules.up, "up", name)
        self.down = self.row_linear(submodules.down, "down", name)
        if config.perform_initialization:
            fills = {"up.weight": config.init_method}
            draw_all(fills, dict(self.named_parameters()), self.table, config, self.tp_group)

    @property
    def last_linear(self) -> nn.Module:
        return self.down

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: BaseInferenceContext | None = None,
        *,
        packed_seq_params: object | None = None,
        adapter: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[l, b, h] -> [l, b, h] and the bias of down, unadded; `adapter` makes what is added to up's product."""
        up, _ = self.up(hidden_states)
        if adapter is not None:
            up = up + adapter(hidden_states)
        if self.dims.gated:
            gate, up = up.chunk(2, dim=-1)
            inner = self.activation(gate * self.dims.gate_multiplier) * up
        else:
            inner = self.activation(up)
        out, bias = self.down(inner)
        if self.dims.out_multiplier != 1:
            out, bias = out * self.dims.out_multiplier, None if bias is None else bias * self.dims.out_multiplier
        return out, bias
