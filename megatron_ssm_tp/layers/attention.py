"""Attention at any TP size, in training, static and dynamic contexts, with nothing but torch.

Why not Megatron's SelfAttention: with fewer heads of keys than ranks it gathers all queries, keys and values (an
all-gather a layer, where every rank can keep the one head it uses), and its dynamic batching is flash-attn's alone.

Shape ledger on one of p ranks, T tokens, H heads of d channels, K heads of keys, k = max(1, K/p) here:

    qkv        column-parallel   [T, d_in] -> q [T, H/p, d]; k, v [T, k, d]     no communication
    rotary     q, k              where the config has it
    attention  q over the cache  [T, H/p, d]                                    keys and values never cross ranks
    out_proj   row-parallel      [T, H d/p] -> [T, h]                           all-reduce: h values a token
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import deprecate_inference_params
from torch import nn

from ..config import AttentionConfig
from ..errors import UserError
from ..ops import attention as ops
from ..partition.parameters import attention_parameters
from .initialization import draw_all
from .partitioned import PartitionedModule
from .rotary import rotate

Adapters = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


@dataclass
class AttentionSubmodules:
    """Megatron's ColumnParallelLinear (qkv) and RowParallelLinear (out), or their likes."""

    qkv: ModuleSpec | type
    out_proj: ModuleSpec | type


class Attention(PartitionedModule):
    """One attention module, as the `mixer` of a layer, beside an SSM mixer, or inside a shared block.

    Arguments as of the mixers. `cache_number` is the one by which contexts know its keys and values, from 1; a stack
    may change it.

    Raises:
        UserError: heads cannot be shared by the group's ranks.
    """

    cache_symbol = Symbols.ATTENTION

    def __init__(
        self,
        config: TransformerConfig,
        submodules: AttentionSubmodules,
        d_model: int,
        attention_config: AttentionConfig | Callable[[TransformerConfig], AttentionConfig],
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        dims = attention_config if isinstance(attention_config, AttentionConfig) else attention_config(config)
        super().__init__(config, attention_parameters(dims, d_model), pg_collection.tp)
        self.dims, self.cache_number = dims, layer_number - pp_layer_offset
        self.qkv = self.column_linear(submodules.qkv, "qkv", name)
        self.out_proj = self.row_linear(submodules.out_proj, "out_proj", name)
        self._sizes = self.qkv.weight.partition_sizes = self.local_sizes("qkv.weight")
        self.sum_gradients_of_shared_rows()
        if config.perform_initialization:
            fills = {"qkv.weight": config.init_method}
            draw_all(fills, dict(self.named_parameters()), self.table, config, self.tp_group)

    @property
    def last_linear(self) -> nn.Module:
        return self.out_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: BaseInferenceContext | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
        packed_seq_params: object | None = None,
        adapters: Adapters | None = None,
        cache_number: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [l, b, d_in], or [l/p, b, d_in] under sequence parallelism -> [.., b, h], out_proj's bias.

        `adapters` make what is added to q, k and v. `cache_number` stands in for the module's own (shared blocks).
        """
        if packed_seq_params is not None:
            raise UserError("packed_seq_params", "given", "is not implemented by this attention", "None")
        context = deprecate_inference_params(inference_context, inference_params)
        return self.out_proj(self.attend(hidden_states, context, adapters, cache_number))

    def attend(
        self,
        hidden_states: torch.Tensor,
        context: BaseInferenceContext | None,
        adapters: Adapters | None = None,
        cache_number: int | None = None,
    ) -> torch.Tensor:
        """All before out_proj: [l, b, H d/p]."""
        q, k, v = self._query_key_value(hidden_states, adapters or {})
        if context is None or not InferenceMode.is_active():
            y = self._dense(*self._placed(q, k, torch.arange(len(q), device=q.device)), v, 0)
        elif context.is_dynamic_batching():
            y = self._dynamic(q, k, v, context, cache_number or self.cache_number)
        else:
            y = self._static(q, k, v, context, cache_number or self.cache_number)
        return y.flatten(-2)

    def _query_key_value(self, hidden_states: torch.Tensor, adapters: Adapters) -> list[torch.Tensor]:
        """q [l, b, H/p, d], k and v [l, b, k, d]."""
        if self.dims.in_multiplier != 1:
            hidden_states = hidden_states * self.dims.in_multiplier
        pieces = dict(zip("qkv", self.qkv(hidden_states)[0].split(self._sizes, dim=-1), strict=True))
        for name, adapter in adapters.items():
            pieces[name] = pieces[name] + adapter(hidden_states)
        if self.dims.key_multiplier != 1:
            pieces["k"] = pieces["k"] * self.dims.key_multiplier
        return [piece.unflatten(-1, (-1, self.dims.head_dim)) for piece in pieces.values()]

    def _placed(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.dims.rotary is None:
            return q, k
        return rotate(q, positions, self.dims.rotary), rotate(k, positions, self.dims.rotary)

    def _dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offset: int) -> torch.Tensor:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        dropout = self.config.attention_dropout if self.training else 0.0
        # Ranks have different heads, so they draw differently: from the model-parallel generator.
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            return ops.attention(q, k, v, self.dims.scale, offset, dropout).transpose(0, 1)

    def _static(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: BaseInferenceContext, number: int
    ) -> torch.Tensor:
        """All rows at one offset; keys and values in the context's dictionary, [max length, b, k, d] each."""
        start, cache = context.sequence_len_offset, context.key_value_memory_dict
        stop = start + len(q)
        if start == 0:
            shape = (context.max_sequence_length, *k.shape[1:])
            cache[number] = k.new_empty(shape), v.new_empty(shape)
        q, k = self._placed(q, k, torch.arange(start, stop, device=q.device))
        keys, values = cache[number]
        keys[start:stop], values[start:stop] = k, v
        return self._dense(q, keys[:stop], values[:stop], start)

    def _dynamic(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: BaseInferenceContext, number: int
    ) -> torch.Tensor:
        """q [padded tokens, 1, H/p, d] of all requests; zero for padding."""
        batch = context.batch_dimensions
        tokens, requests = batch.token_count, batch.req_count
        q, k = self._placed(q, k, context.gpu_view.token_to_pos_ids[: len(q)])
        context.append_key_value_cache(number, k, v)
        keys, values, table = context.key_value_cache(number)
        cu_seqlens, most_queries = context.cu_query_lengths()
        _, lengths, most_keys = context.cu_kv_lengths()
        y = torch.zeros_like(q)
        y[:tokens, 0] = ops.paged_attention(
            q[:tokens, 0],
            keys,
            values,
            table[:requests],
            cu_seqlens[: requests + 1],
            lengths[:requests],
            (most_queries, most_keys),
            self.dims.scale,
        )
        return y
