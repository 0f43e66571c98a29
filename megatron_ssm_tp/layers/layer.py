"""Megatron's MambaLayer, x + mixer(norm(x)), for mixers of every kind."""

from collections.abc import Callable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ..comm.fused import all_reduce_add_norm
from ..ops.norm import add_rms_norm
from .norm import LocalRMSNorm
from .row_parallel import has_parts, recipe_now, unreduced

Partial = tuple[torch.Tensor, Callable | None]  # of SSMMixer.partial


class MixerLayer(MambaLayer):
    """A layer whose mixer may also be attention or an MLP: HybridStack builds those with more arguments.

    Stages of a pipeline and multi-token prediction are not told apart here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,
        is_mtp_layer: bool = False,
        add_layer_offset: bool = False,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, pp_layer_offset, name)

    @property
    def adds_plainly(self) -> bool:
        """Whether forward is the norm, the mixer and an addition, as with_next_norm has it, and nothing sees it run."""
        dropped = self.training and self.hidden_dropout
        plain = self.mamba_bda is get_bias_dropout_add and type(self.norm) is LocalRMSNorm and not dropped
        return plain and not (self._forward_hooks or self._forward_pre_hooks)

    def with_next_norm(
        self,
        hidden_states: torch.Tensor,
        normed: torch.Tensor,
        following: LocalRMSNorm,
        context: BaseInferenceContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer in inference, and the norm that reads it: in one kernel with the addition, and with the reduction
        where a recipe does it.

        Args:
            hidden_states: the residual stream [l, b, h].
            normed: this layer's norm of it, in params_dtype.
            following: the next layer's norm, which takes the stream in params_dtype.

        Returns:
            The residual stream behind this layer, and `following` of it.
        """
        residual, linear = self._residual(hidden_states), self.mixer.last_linear
        recipe = recipe_now(linear) if linear is not None and linear.bias is None else None
        if recipe is not None:
            with unreduced(linear):
                partial, _ = self.mixer(normed, inference_context=context)
            return all_reduce_add_norm(partial, residual, following.weight, following.eps, linear.tp_group, recipe)
        if not has_parts(linear):
            return _add_and_norm(*self.mixer(normed, inference_context=context), residual, following)
        with unreduced(linear):
            parts, _ = self.mixer(normed, inference_context=context)
        return add_rms_norm(parts, residual, following.weight, following.eps)

    # with_next_norm in two steps, of a layer whose mixer is an SSM's

    def partial(self, normed: torch.Tensor, context: BaseInferenceContext) -> Partial:
        """All up to this rank's part of out_proj's product."""
        return self.mixer.partial(*self.mixer.mix(normed, context))

    def sum_and_norm(
        self, partial: Partial, hidden_states: torch.Tensor, following: LocalRMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rest: the sum over the ranks, the addition and the next norm. May overwrite `partial`."""
        residual, linear = self._residual(hidden_states), self.mixer.last_linear
        recipe = recipe_now(linear) if linear is not None and linear.bias is None else None
        if recipe is None:
            return _add_and_norm(self.mixer.summed(*partial), self.mixer.out_proj.bias, residual, following)
        norm = following.weight, following.eps
        return all_reduce_add_norm(partial[0], residual, *norm, linear.tp_group, recipe)

    def _residual(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.float() if self.config.fp32_residual_connection else hidden_states


def _add_and_norm(
    out: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, following: LocalRMSNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    if bias is not None:
        out = out.to(residual.dtype) + bias.to(residual.dtype)
    return add_rms_norm(out, residual, following.weight, following.eps)
