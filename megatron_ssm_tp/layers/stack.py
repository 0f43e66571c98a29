"""Megatron's HybridStack without Transformer Engine, with a cache for every mixer of ours."""

from itertools import pairwise

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.enums import InferenceCudaGraphScope
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import WrappedTensor, deprecate_inference_params, make_viewless_tensor

from ..errors import UserError
from .attention import Attention
from .halves import forward_in_halves, prompt_lengths
from .layer import MixerLayer
from .mixer import SSMMixer
from .norm import LocalRMSNorm
from .row_parallel import RecipeRowParallelLinear, recipe_now
from .shared_block import SharedBlockLayer, SharedBlocks


class SSMStack(HybridStack):
    """Differs from HybridStack in three points:

    - the final norm is LocalRMSNorm (HybridStack hard-codes Transformer Engine's);
    - what it receives is scaled by `embedding_multiplier` (Falcon-H1);
    - `layer_type_list`, by which contexts keep caches, lists every cache: a layer that has two, of states and of keys
      and values, finds the second behind those of all layers. A stack without attention lists one that nothing writes,
      because DynamicInferenceContext refuses models without any; `inference.state` sizes it to next to nothing.
    """

    overlap_from: int | None = None  # tokens of prompts from which on a pass is taken in halves, see halves.py

    def __init__(self, *args, post_layer_norm: bool = True, embedding_multiplier: float = 1.0, **kwargs) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm, self.embedding_multiplier = post_layer_norm, embedding_multiplier
        if self.post_process and post_layer_norm:
            config = self.config
            self.final_norm = LocalRMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.layer_type_list = self._number_caches()

    def _number_caches(self) -> list[str]:
        """Number every cache from 1, as contexts do; returns what each of them holds."""
        symbols = list(self.layer_type_list)
        for own, layer in zip(self.layer_type_list, self.layers, strict=True):
            for module in layer.modules():
                symbol = getattr(module, "cache_symbol", own)
                if symbol != own:
                    symbols.append(symbol)
                    module.cache_number = len(symbols)
        return symbols if Symbols.ATTENTION in symbols else [*symbols, Symbols.ATTENTION]

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shapes of a request's conv and ssm state in a layer; None without SSM mixers."""
        mixers = (module for module in self.modules() if isinstance(module, SSMMixer))
        mixer = next(mixers, None)
        return None if mixer is None else mixer.mamba_state_shapes_per_request()

    def forward(self, hidden_states: torch.Tensor | WrappedTensor, *args, **kwargs) -> torch.Tensor:
        """As HybridStack's.

        Raises:
            UserError: rotary embeddings from outside, where our attention has its own or none.
        """
        if kwargs.get("rotary_pos_emb") is not None and any(isinstance(m, Attention) for m in self.modules()):
            raise UserError("position_embedding_type", "rope", "is not read by this attention", "none")
        if self.pre_process and self.embedding_multiplier != 1:
            hidden_states = _unwrapped(hidden_states) * self.embedding_multiplier
        context = kwargs.get("inference_context")
        if kwargs.get("packed_seq_params") is None and self._fuses(context):
            return self._fused(_unwrapped(hidden_states), context)
        return super().forward(hidden_states, *args, **kwargs)

    def _fuses(self, context: BaseInferenceContext | None) -> bool:
        """Whether additions can be left to the next norm: dynamic inference of a whole stack of our layers.

        Graphs of single layers and low-precision products are HybridStack's business.
        """
        if context is None or torch.is_grad_enabled() or not InferenceMode.is_active():
            return False
        config = self.config
        scope = config.inference_cuda_graph_scope
        of_layers = config.cuda_graph_impl != "none" and scope != InferenceCudaGraphScope.block
        plain = not (of_layers or config.fp8 or config.fp4 or config.sequence_parallel)
        whole = self.pre_process and self.post_process and self.post_layer_norm
        if not (plain and whole and context.is_dynamic_batching()):
            return False
        return len(self.layers) > 0 and all(type(layer) is MixerLayer and layer.adds_plainly for layer in self.layers)

    def _overlapped(self, context: BaseInferenceContext) -> list[int] | None:
        """The lengths of the prompts of a pass that is taken in halves; None: it is not."""
        prompts = context.batch_dimensions.token_count - context.batch_dimensions.decode_req_count
        if self.overlap_from is None or prompts < max(2, self.overlap_from):
            return None
        return prompt_lengths(context) if all(map(_reduces_alone, self.layers)) else None

    def _fused(self, hidden_states: torch.Tensor, context: BaseInferenceContext) -> torch.Tensor:
        """The layers, each with the norm that follows it: [l, b, h] -> [l, b, h] after the final norm."""
        layers, dtype = list(self.layers), self.config.params_dtype
        lengths = self._overlapped(context)
        if lengths:
            both = forward_in_halves(layers, self.final_norm, hidden_states, context, lengths)
            return torch.cat([normed if stream.dtype == dtype else self.final_norm(stream) for stream, normed in both])
        normed = layers[0].norm(hidden_states.to(dtype))
        for layer, following in pairwise(layers):
            hidden_states, normed = layer.with_next_norm(hidden_states, normed, following.norm, context)
        if hidden_states.dtype == dtype:
            return layers[-1].with_next_norm(hidden_states, normed, self.final_norm, context)[1]
        # The final norm takes a float32 stream as it is.
        return self.final_norm(layers[-1](hidden_states, inference_context=context))


def _reduces_alone(layer: MixerLayer) -> bool:
    """Whether its mixer is an SSM's, and no reduction but the last goes by a recipe."""
    mixer = layer.mixer
    if not (isinstance(mixer, SSMMixer) and isinstance(mixer.out_proj, RecipeRowParallelLinear)):
        return False
    return recipe_now(getattr(mixer, "x_proj", None)) is None


def _unwrapped(hidden_states: torch.Tensor | WrappedTensor) -> torch.Tensor:
    return hidden_states.unwrap() if isinstance(hidden_states, WrappedTensor) else hidden_states


class SharedBlockStack(SSMStack):
    """A stack whose SharedBlockLayers call the blocks it owns, and see the embeddings that it received.

    Args:
        shared_blocks: how many, and the spec of one.

    Raises:
        UserError: what only HybridStack's own loop does: pipeline stages, recomputation of whole layers.
    """

    def __init__(self, *args, count: int, block: ModuleSpec, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.pp_group.size() > 1:
            raise UserError("pipeline_model_parallel_size", self.pp_group.size(), "would part shared blocks", "1")
        name = f"{kwargs.get('name') or 'decoder'}.shared_blocks"
        self.shared_blocks = SharedBlocks(self.config, count, block, self.pg_collection, name)

    def forward(
        self,
        hidden_states: torch.Tensor | WrappedTensor,
        attention_mask: torch.Tensor | None,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
        packed_seq_params: object | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [l, b, h] -> [l, b, h] after the final norm; masks and rotary_pos_emb are not used."""
        if self.config.recompute_granularity == "full" and self.training:
            raise UserError("recompute_granularity", "full", "is not implemented with shared blocks", "None, selective")
        context = deprecate_inference_params(inference_context, inference_params)
        embeddings = hidden_states = _unwrapped(hidden_states)
        calls = 0
        for layer in self.layers:
            arguments = {"inference_context": context, "packed_seq_params": packed_seq_params}
            if isinstance(layer, SharedBlockLayer):
                block = self.shared_blocks.of_call(calls)
                hidden_states = layer(hidden_states, embeddings, block, **arguments)
                calls += 1
            else:
                hidden_states = layer(hidden_states, attention_mask=attention_mask, **arguments)
        if self.post_process and self.post_layer_norm:
            hidden_states = self.final_norm(hidden_states)
        return make_viewless_tensor(hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)
