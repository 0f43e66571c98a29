"""A whole language model on one rank: Megatron's HybridModel with our stack and an exact vocabulary."""

import torch
import torch.distributed as dist
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from ..comm.autocast import recipe_of
from ..comm.exchange import argmax_over_ranks, shares_words
from ..comm.mappings import reduce_from_tensor_model_parallel_region
from ..comm.recipes import Bf16
from ..config import AttentionConfig, Layer, ModelConfig
from ..ops.argmax import argmax_rows
from ..ops.embedding import embedding_rows
from ..ops.few_rows import few_rows_linear
from ..partition.layout import check_tp_size, padded_vocab_size
from .pass_context import PassContext
from .specs import model_stack_spec


class SSMModel(HybridModel):
    """HybridModel whose vocabulary is the checkpoint's, while embedding and head hold rows padded to divide by TP.

    Padded ids exist on no output: gathered logits [b, s, vocab_size] are cut to the real vocabulary, so they can
    neither be sampled nor named, and the loss gives them no probability. Logits are scaled by `logits_multiplier`.
    """

    def __init__(
        self, *args, vocab_size: int, padded_vocab_size: int, logits_multiplier: float = 1.0, **kwargs
    ) -> None:
        super().__init__(*args, vocab_size=padded_vocab_size, parallel_output=True, **kwargs)
        self.vocab_size = vocab_size  # what samplers and callers see
        self.logits_multiplier = logits_multiplier

    def forward(self, *args, labels: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """As HybridModel: the loss [b, s] of `labels`, or logits; gathered logits (runtime_gather_output) are cut."""
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is None and kwargs.get("runtime_gather_output"):
            return output[..., : self.vocab_size]
        return output

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross entropy over the real vocabulary; logits [s, b, padded / p] still lie on their ranks."""
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        ids = torch.arange(first, first + logits.shape[-1], device=logits.device)
        return super().compute_language_model_loss(labels, logits.masked_fill(ids >= self.vocab_size, float("-inf")))

    def logits_of_pass(
        self, token_ids: torch.Tensor, context: PassContext, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A pass over slots of state in inference: logits [rows, vocab_size] after the tokens whose indices are `last`
        (None: all), in the model's dtype, the same on every rank.

        Args:
            token_ids: int64 [T], the tokens of the pass in `context`'s order.
        """
        return self._gathered(self._logits_here(token_ids, context, last))

    def likeliest_of_pass(self, token_ids: torch.Tensor, context: PassContext) -> torch.Tensor:
        """The places of the largest of `logits_of_pass`, int64 [rows]; of equal ones the first."""
        group, logits = self.pg_collection.tp, self._logits_here(token_ids, context)
        if shares_words(logits, group, recipe_of("output_layer", group)):
            first = group.rank() * logits.shape[1]
            return argmax_over_ranks(logits, first, min(logits.shape[1], max(0, self.vocab_size - first)), group)
        return argmax_rows(self._gathered(logits))

    def _logits_here(
        self, token_ids: torch.Tensor, context: PassContext, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Those of the vocabulary's part that lies on this rank [rows, V/p], padding too."""
        hidden = self.decoder(self._embedded(token_ids), attention_mask=None, inference_context=context)
        hidden = hidden if last is None else hidden.index_select(0, last)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return self._scale_logits(few_rows_linear(hidden[:, 0], weight))

    def _embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        """self.embedding of tokens [T] in inference, [T, 1, h], in fewer launches."""
        words, group = self.embedding.word_embeddings, self.pg_collection.tp
        dtype = torch.float32 if self.config.fp32_residual_connection else words.weight.dtype
        if group.size() == 1:
            return embedding_rows(token_ids, words.weight, 0, dtype)[:, None]
        rows = embedding_rows(token_ids, words.weight, words.vocab_start_index, words.weight.dtype)
        # All ranks but one add zeros: 16-bit sums are exact, whatever the recipe would make of them.
        recipe = Bf16() if shares_words(rows, group, recipe_of("embedding.word_embeddings", group)) else None
        return reduce_from_tensor_model_parallel_region(rows, group, recipe).to(dtype)[:, None]

    def _scale_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.logits_multiplier == 1 else logits * self.logits_multiplier

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        """Each rank's logits side by side on all, without padding. Megatron's own wants a CUDA device."""
        group, (rows, columns) = self.pg_collection.tp, part.shape
        if group.size() > 1:
            parts = part.new_empty(group.size() * rows, columns)
            dist.all_gather_into_tensor(parts, part.contiguous(), group=group)
            part = parts.view(-1, rows, columns).transpose(0, 1).flatten(1)
        return part[:, : self.vocab_size]


# How the layers are written in Megatron's patterns: the symbol of the cache that a layer has, or of its first.
SYMBOLS = {
    Layer.SSM: Symbols.MAMBA,
    Layer.ATTENTION: Symbols.ATTENTION,
    Layer.MLP: Symbols.MLP,
    Layer.PARALLEL: Symbols.MAMBA,
    Layer.SHARED: Symbols.ATTENTION,
}


def _attention_sizes(attention: AttentionConfig | None, tp: int) -> dict[str, int]:
    """What contexts size the cache by; without attention that of the phantom layer: one value a token and rank."""
    if attention is None:
        return {"num_attention_heads": tp, "num_query_groups": tp, "kv_channels": 1}
    return {
        "num_attention_heads": attention.n_heads,
        "num_query_groups": max(attention.n_kv_heads, tp),  # a head that ranks share counts for each
        "kv_channels": attention.head_dim,
    }


def transformer_config(
    model: ModelConfig, tp: int, dtype: torch.dtype, device: torch.device, sampling_seed: int, **overrides
) -> TransformerConfig:
    """Megatron's config for `model`."""
    settings = {
        "num_layers": len(model.layers),
        "hidden_size": model.hidden_size,
        **_attention_sizes(model.attention, tp),
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "mamba_state_dim": model.mixer.d_state,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "fp32_residual_connection": model.residual_in_fp32 and dtype != torch.float32,
        "cuda_graph_modules": [],  # whole layers; Megatron's default, "full", is the same and warns of itself
        "bias_dropout_fusion": False,  # torch.compile of two additions: seconds at the first token
        "use_cpu_initialization": device.type == "cpu",
        "perform_initialization": False,  # every value comes from the checkpoint
        "tensor_model_parallel_size": tp,
        "inference_sampling_seed": sampling_seed,
    }
    return TransformerConfig(**(settings | overrides))


def build_model(
    model: ModelConfig,
    pg_collection: ProcessGroupCollection,
    dtype: torch.dtype,
    device: torch.device,
    max_sequence_length: int,
    sampling_seed: int = 0,
    exact_norm: bool = False,
    ops: str = "auto",
    **overrides,
) -> SSMModel:
    """One rank's model with uninitialized parameters, named as in `partition.layout.model_parameters`.

    `exact_norm` and `ops` as in Mamba2Mixer; `overrides` go to Megatron's TransformerConfig.

    Raises:
        UserError: the model cannot be cut for pg_collection.tp; the message has the legal sizes.
    """
    tp = pg_collection.tp.size()
    check_tp_size(model, tp)
    return SSMModel(
        config=transformer_config(model, tp, dtype, device, sampling_seed, **overrides),
        hybrid_stack_spec=model_stack_spec(model, exact_norm, ops),
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocab_size(model, tp),
        logits_multiplier=model.logits_multiplier,
        max_sequence_length=max_sequence_length,
        hybrid_layer_pattern="".join(SYMBOLS[layer] for layer in model.layers),
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="none",
        pg_collection=pg_collection,
    )
