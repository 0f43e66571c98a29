"""Transformer blocks that several layers share, and the layers that call them (HF Zamba, Zamba2).

A block sees [hidden, embedding] side by side and its output goes, through a linear of the calling layer, into that
layer's SSM mixer, not into the residual stream. Weights are shared; keys and values are not: every call has its own.

    t   = linear(mlp(norm(attention(norm([x, e])))))       no residual inside
    x'  = x + mixer(norm(x + t))

All-reduces: attention's and the MLP's of the block, then the mixer's. `linear` [h, h] and the low-rank halves of the
adapters are whole on every rank: cutting them would cost one more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ..partition.parameters import Table
from .attention import Attention
from .initialization import draw_all
from .layer import MixerLayer
from .lean_linear import LeanColumnParallelLinear
from .mlp import MLP
from .norm import LocalRMSNorm
from .partitioned import PartitionedModule


def _add_bias(output: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    out, bias = output
    return out if bias is None else out + bias


class _WholeLinear(nn.Linear):
    """A linear without bias that every rank holds whole."""

    def __init__(self, config: TransformerConfig, d_in: int, d_out: int) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(d_in, d_out, bias=False, device=device, dtype=config.params_dtype)
        # Under sequence parallelism each rank sees some tokens: finalize_model_grads sums the gradients of these.
        self.weight.sequence_parallel = config.sequence_parallel


class Adapter(PartitionedModule):
    """A low-rank addition to a column-parallel product: up(down(x)), cut as the product is."""

    def __init__(self, config: TransformerConfig, table: Table, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, table, pg_collection.tp)
        rank, d_in = table["down.weight"].shape
        self.down = _WholeLinear(config, d_in, rank)
        self.up = self.column_linear(LeanColumnParallelLinear, "up", None)
        self.sum_gradients_of_shared_rows()
        if config.perform_initialization:
            fills = {"up.weight": config.init_method}
            draw_all(fills, dict(self.named_parameters()), table, config, self.tp_group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))[0]


@dataclass
class SharedBlockSubmodules:
    """An Attention and an MLP."""

    attention: ModuleSpec
    mlp: ModuleSpec


class SharedBlock(MegatronModule):
    """mlp(norm(attention(norm(x)))) for x [l, b, d_in of attention]."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SharedBlockSubmodules,
        pg_collection: ProcessGroupCollection,
        name: str,
    ) -> None:
        super().__init__(config)
        common = {"config": config, "d_model": config.hidden_size, "layer_number": 1, "pg_collection": pg_collection}
        self.attention: Attention = build_module(submodules.attention, **common, name=f"{name}.attention")
        self.mlp: MLP = build_module(submodules.mlp, **common, name=f"{name}.mlp")
        self.input_norm = LocalRMSNorm(config, self.attention.dims.d_in, config.layernorm_epsilon)
        self.mlp_norm = LocalRMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(
        self, x: torch.Tensor, context: BaseInferenceContext | None, adapters: Mapping[str, Adapter], number: int
    ) -> torch.Tensor:
        """[l, b, d_in] -> [l, b, h]; `adapters` and the `number` of its cache are the call's."""
        by_name = dict(adapters)
        for_mlp = by_name.pop("up", None)
        hidden = _add_bias(self.attention(self.input_norm(x), context, adapters=by_name, cache_number=number))
        return _add_bias(self.mlp(self.mlp_norm(hidden), adapter=for_mlp))


class SharedBlocks(MegatronModule):
    """All blocks of a model; calls take them in turn."""

    def __init__(
        self, config: TransformerConfig, count: int, block: ModuleSpec, pg_collection: ProcessGroupCollection, name: str
    ) -> None:
        super().__init__(config)
        self.count = count
        for index in range(count):
            self.add_module(
                str(index), build_module(block, config, pg_collection=pg_collection, name=f"{name}.{index}")
            )

    def of_call(self, call: int) -> SharedBlock:
        return self.get_submodule(str(call % self.count))


@dataclass
class SharedBlockLayerSubmodules(MambaLayerSubmodules):
    """A layer's norm and mixer, and the tables of its adapters by what they are added to: q, k, v, up."""

    adapters: dict[str, Table] = field(default_factory=dict)


class SharedBlockLayer(MixerLayer):
    """A call of a shared block, then an SSM mixer. In patterns it is `*`: contexts keep keys and values for it.

    The mixer's states are kept under a number that the stack gives it, behind those of the layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SharedBlockLayerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        **kwargs,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, pp_layer_offset, **kwargs)
        self.cache_number = layer_number - pp_layer_offset
        self.linear = _WholeLinear(config, config.hidden_size, config.hidden_size)
        self.adapters = _Adapters(config, submodules.adapters, pg_collection)

    def forward(
        self,
        hidden_states: torch.Tensor,
        embeddings: torch.Tensor,
        block: SharedBlock,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """hidden_states and embeddings [l, b, h] -> [l, b, h]."""
        both = torch.cat([hidden_states, embeddings], dim=-1).to(self.config.params_dtype)
        shared = self.linear(block(both, inference_context, dict(self.adapters.named_children()), self.cache_number))
        mixed = self.norm((hidden_states + shared).to(self.config.params_dtype))
        out = self.mixer(mixed, inference_context=inference_context, packed_seq_params=packed_seq_params)
        add: Callable = self.mamba_bda(training=self.training, fused=self.config.bias_dropout_fusion)
        return add(out, hidden_states, self.hidden_dropout)


class _Adapters(MegatronModule):
    """Adapter modules by name, as one module that Megatron's distributed checkpoints can walk."""

    def __init__(self, config: TransformerConfig, tables: dict[str, Table], pg: ProcessGroupCollection) -> None:
        super().__init__(config)
        for name, table in tables.items():
            self.add_module(name, Adapter(config, table, pg))
