"""An SSM mixer and attention side by side, their products summed before one reduction (HF FalconH1DecoderLayer)."""

from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from .attention import Attention
from .mixer import SSMMixer
from .row_parallel import partial_product, reduce_partial


@dataclass
class ParallelMixerSubmodules:
    """An SSMMixer and an Attention."""

    ssm: ModuleSpec
    attention: ModuleSpec


class ParallelMixer(MegatronModule):
    """ssm_multiplier x ssm(x) + attention_multiplier x attention(x): one all-reduce where two modules would pay two.

    Both products are partial sums of the same tokens, so they are added on each rank and reduced once. A norm whose
    sums travel with the SSM's product has to be finished before the addition: then both travel side by side, still in
    one reduction.
    """

    chunk_size = SSMMixer.chunk_size

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ParallelMixerSubmodules,
        d_model: int,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,
        ssm_multiplier: float = 1.0,
        attention_multiplier: float = 1.0,
    ) -> None:
        super().__init__(config)
        self.tp_group, self.d_model = pg_collection.tp, d_model
        self.multipliers = ssm_multiplier, attention_multiplier

        def build(child: str) -> MegatronModule:
            return build_module(
                getattr(submodules, child),
                config,
                d_model=d_model,
                layer_number=layer_number,
                pg_collection=pg_collection,
                pp_layer_offset=pp_layer_offset,
                name=None if name is None else f"{name}.{child}",
            )

        self.ssm: SSMMixer = build("ssm")
        self.attention: Attention = build("attention")
        self.attention.out_proj.reduced_elsewhere = True  # with the SSM's, at its site

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.ssm.mamba_state_shapes_per_request()

    @property
    def last_linear(self) -> nn.Module | None:
        biased = self.attention.out_proj.bias is not None
        return None if biased else self.ssm.last_linear

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: BaseInferenceContext | None = None,
        *,
        packed_seq_params: object | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[l, b, h] -> the same shape, and both biases, summed and unadded."""
        for_ssm, for_attention = self.multipliers
        ssm, complete = self.ssm.partial(*self.ssm.mix(hidden_states, inference_context))
        y = self.attention.attend(hidden_states, inference_context)
        attention = partial_product(self.attention.out_proj, y)
        if complete is None:
            out = self._reduced(ssm * for_ssm + attention * for_attention)
        else:
            both = self._reduced(torch.cat([attention, ssm], dim=-1), self.ssm.norm.columns(ssm.dtype))
            attention, ssm = both.split([self.d_model, ssm.shape[-1]], dim=-1)
            out = complete(ssm) * for_ssm + attention * for_attention
        biases = self.ssm.out_proj.bias, self.attention.out_proj.bias
        scaled = [bias * m for bias, m in zip(biases, self.multipliers, strict=True) if bias is not None]
        return out, sum(scaled[1:], scaled[0]) if scaled else None

    def _reduced(self, partial: torch.Tensor, exact_columns: int = 0) -> torch.Tensor:
        """The one reduction of both products, at the site of the SSM's out_proj."""
        return reduce_partial(self.ssm.out_proj, partial, exact_columns)
