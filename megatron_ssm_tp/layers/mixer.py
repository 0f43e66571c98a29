"""What every SSM mixer has in common: how it meets training, Megatron's static context and its dynamic context.

A mixer is a projection in, a causal convolution, a scan with a state, and a projection out. A subclass says what these
are; this class says which tokens go through them, with which states:

    training, evaluation   [l, b, ..]   every row from an empty state
    static context         [l, b, ..]   all rows at one offset, states in the context's dictionary
    dynamic context        [T, ..]      one token of each decoding request, then prompts end to end, states by slot
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import deprecate_inference_params
from torch import nn

from ..errors import UserError
from ..ops.choose import implementation
from ..partition.parameters import Table
from .partitioned import PartitionedModule
from .row_parallel import reduce_partial

States = tuple[torch.Tensor, torch.Tensor]
Tensors = tuple[torch.Tensor, ...]


class Packed(NamedTuple):
    """Where the states of packed prompts, or parts of them, are: [slots, ..], int [s], int32 [s + 1]; and the tokens of
    the longest, if the host knows."""

    states: torch.Tensor
    slots: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int | None = None


class SSMMixer(PartitionedModule):
    """Base of the mixers.

    Subclasses set `conv1d_weight` and `conv1d_bias` through the table of parameters, and define `project`, `inputs`,
    `scan`, `ssm_prefill`, `ssm_decode`, `finish`, `partial` and `mamba_state_shapes_per_request`. `cache_number` is
    the one by which contexts know this mixer's states, from 1; a stack may change it.

    Args:
        config: Megatron's config; params_dtype is the dtype of all parameters but those the table keeps in float32.
        table: parameters by their names in the module.
        pg_collection: its `tp` group is the one the mixer is cut over.
        ops: who computes convolution and scan, see ops/choose.py.

    Raises:
        UserError: the table cannot be shared by the group's ranks, or there is no such implementation.
    """

    cache_symbol = Symbols.MAMBA
    chunk_size = 128  # read by MambaInferenceStateConfig.from_model; only prefix caching, which is refused, acts on it

    def __init__(
        self,
        config: TransformerConfig,
        table: Table,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int,
        ops: str = "auto",
    ) -> None:
        super().__init__(config, table, pg_collection.tp)
        self.ops = implementation(ops)
        self._rates, self._rates_made_of = None, None
        self.layer_number, self.cache_number = layer_number, layer_number - pp_layer_offset

    def _build_parameters(self, device: torch.device) -> None:
        """Register the table's parameters that belong to no submodule: all are cut along their first axis."""
        for name in (name for name in self.table if "." not in name):
            self.register_parameter(name, self.new_parameter(name, device))
        if "conv1d_bias" not in self.table:
            self.register_parameter("conv1d_bias", None)

    def _apply(self, fn: Callable, recurse: bool = True) -> "SSMMixer":
        """Keep A_log and D in float32 when the module is cast, as Megatron's Float16Module does to everything."""
        kept = {name: getattr(self, name).data for name, p in self.table.items() if p.keep_fp32}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        return self

    # What a subclass defines, on local channels; tokens are [l, b, ..] or [T, 1, ..]

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """in_proj: what is convolved, and what goes around the convolution."""
        raise TypeError(f"{type(self).__name__} does not define project")

    def inputs(self, convolved: torch.Tensor, around: Tensors) -> Tensors:
        """The scan's inputs a token: the first is what the output has the shape of, before heads are seen."""
        raise TypeError(f"{type(self).__name__} does not define inputs")

    def scan(self, tokens: Tensors, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense [b, l, ..], from an empty state or the one given: output [b, l, D/p] and the state after it."""
        raise TypeError(f"{type(self).__name__} does not define scan")

    def ssm_prefill(self, tokens: Tensors, packed: Packed) -> torch.Tensor:
        """Packed prompts or parts of them [T, ..]: output [T, D/p]; states from and into the slots."""
        raise TypeError(f"{type(self).__name__} does not define ssm_prefill")

    def ssm_decode(self, tokens: Tensors, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """One token a request [s, ..]: output [s, D/p]; states updated in place, at rest since the last pass."""
        raise TypeError(f"{type(self).__name__} does not define ssm_decode")

    def finish(self, y: torch.Tensor, around: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        """out_proj, and its bias unadded."""
        raise TypeError(f"{type(self).__name__} does not define finish")

    def partial(self, y: torch.Tensor, around: Tensors) -> tuple[torch.Tensor, Callable | None]:
        """out_proj before its reduction, and what makes the product of the reduced; None: it is the product."""
        raise TypeError(f"{type(self).__name__} does not define partial")

    def summed(self, partial: torch.Tensor, complete: Callable | None) -> torch.Tensor:
        """out_proj's product, of what `partial` gives."""
        return reduce_partial(self.out_proj, partial)

    @property
    def last_linear(self) -> nn.Module | None:
        """The linear whose reduced product is the output; None: the sum is worked on, see `partial`."""
        return self.out_proj

    # Forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: BaseInferenceContext | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
        packed_seq_params: object | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [l, b, h], or [l/p, b, h] under sequence parallelism -> the same shape, and out_proj's bias.

        With an inference context b is 1 under dynamic batching (l packed tokens) and the batch under static.
        """
        if packed_seq_params is not None:
            raise UserError("packed_seq_params", "given", "is not implemented by these mixers", "None")
        return self.finish(*self.mix(hidden_states, deprecate_inference_params(inference_context, inference_params)))

    def mix(self, hidden_states: torch.Tensor, context: BaseInferenceContext | None) -> tuple[torch.Tensor, Tensors]:
        """All before out_proj: y [l, b, D/p], and what went around the convolution."""
        x, around = self.project(hidden_states)
        if context is None or not InferenceMode.is_active():
            y = self._dense(x, around, None)[0]
        elif context.is_dynamic_batching():
            y = self._dynamic(x, around, context)
        else:
            y = self._static(x, around, context)
        return y, around

    def conv_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Taps [channels/p, K] and bias."""
        return self.conv1d_weight.squeeze(1), self.conv1d_bias

    def _dense(self, x: torch.Tensor, around: Tensors, states: States | None) -> tuple[torch.Tensor, States]:
        conv_state, ssm_state = states or (None, None)
        convolved, conv_state = self.ops.causal_conv1d(x.transpose(0, 1), *self.conv_weights(), conv_state)
        tokens = self.inputs(convolved.transpose(0, 1), around)
        y, ssm_state = self.scan(tuple(t.transpose(0, 1) for t in tokens), ssm_state)
        return y.transpose(0, 1).contiguous(), (conv_state, ssm_state)

    def _static(self, x: torch.Tensor, around: Tensors, context: BaseInferenceContext) -> torch.Tensor:
        cache, batch = context.key_value_memory_dict, x.shape[1]
        fresh = context.sequence_len_offset == 0
        y, states = self._dense(x, around, None if fresh else cache[self.cache_number])
        if fresh:
            cache[self.cache_number] = self.allocate_inference_cache(batch)
        for kept, new in zip(cache[self.cache_number], states, strict=True):
            kept.copy_(new)
        return y

    def allocate_inference_cache(self, batch_size: int, ssm_dtype: torch.dtype = torch.float32) -> States:
        """Zero states for static batching: conv [b, ..] in the model's dtype and ssm [b, ..] in `ssm_dtype`."""
        conv, ssm = self.mamba_state_shapes_per_request()
        weight = self.conv1d_weight
        return weight.new_zeros(batch_size, *conv), weight.new_zeros(batch_size, *ssm, dtype=ssm_dtype)

    def _dynamic(self, x: torch.Tensor, around: Tensors, context: BaseInferenceContext) -> torch.Tensor:
        """x [padded tokens, 1, ..] -> y [padded tokens, 1, D/p], zero for padding.

        Convolution and scan differ between decode and prefill; what lies between takes all tokens at once, so that a
        mixed step pays no more all-reduces than a pure one.
        """
        _refuse_unsupported(context)
        conv_states, ssm_states = context.mamba_states_cache(self.cache_number)
        metadata, batch = context.mamba_metadata, context.batch_dimensions
        decodes, prefills, tokens = batch.decode_req_count, batch.prefill_req_count, batch.token_count
        if not prefills and decodes == tokens == x.shape[0]:
            slots = metadata.batch_indices_decode[:decodes]
            convolved = self._conv_step(x.squeeze(1), conv_states, slots)
            return self.step(convolved.unsqueeze(1), around, ssm_states, slots)
        x = x.squeeze(1)
        # Padding goes with the prompts, which leave it out.
        decode, prefill = slice(0, decodes), slice(decodes, x.shape[0])
        parts = []
        if decodes:
            decode_slots = metadata.batch_indices_decode[:decodes]
            parts.append(self._conv_step(x[decode], conv_states, decode_slots))
        if prefills:
            prefill_slots = metadata.batch_indices_prefill[:prefills]
            cu_seqlens = metadata.cu_seqlens[: prefills + 1]
            where = (conv_states, prefill_slots, cu_seqlens)
            parts.append(self.ops.causal_conv1d_varlen(x[prefill], *self.conv_weights(), *where))
        convolved = _joined(parts, tokens, x)
        inputs = [t.squeeze(1) for t in self.inputs(convolved.unsqueeze(1), around)]
        parts = []
        if decodes:
            parts.append(self.ssm_decode(_part(inputs, decode), ssm_states, decode_slots))
        if prefills:
            longest = getattr(context, "longest", None)  # Megatron's contexts do not tell
            packed = Packed(ssm_states, prefill_slots, cu_seqlens, longest)
            parts.append(self.ssm_prefill(_part(inputs, prefill), packed))
        return _joined(parts, tokens, inputs[0].flatten(1)).unsqueeze(1)

    def _conv_step(self, x: torch.Tensor, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        # A layer's states are written by its own convolution and scan alone, a pass ago: in_proj ran since.
        return self.ops.causal_conv1d_step(x, *self.conv_weights(), states, slots, at_rest=True)

    def step(self, convolved: torch.Tensor, around: Tensors, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """One token of each of s requests from the convolution on: [s, 1, ..] -> y [s, 1, D/p], states in place."""
        inputs = tuple(t.squeeze(1) for t in self.inputs(convolved, around))
        return self.ssm_decode(inputs, states, slots).unsqueeze(1)

    def decay_rates(self) -> torch.Tensor:
        """A = -exp(A_log), float32. Without autograd it is kept, and in its place: CUDA graphs read it there."""
        if torch.is_grad_enabled() or self.A_log.is_inference():
            return -torch.exp(self.A_log)
        made_of = self.A_log.data_ptr(), self.A_log._version, self.A_log.device
        if self._rates_made_of != made_of:
            with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode cannot be written to
                rates = -torch.exp(self.A_log)
            same_place = self._rates is not None and self._rates.device == rates.device
            self._rates = self._rates.copy_(rates) if same_place else rates
            self._rates_made_of = made_of
        return self._rates


def _part(tokens: Sequence[torch.Tensor], part: slice) -> Tensors:
    return tuple(t[part] for t in tokens)


def _joined(parts: list[torch.Tensor], tokens: int, like: torch.Tensor) -> torch.Tensor:
    """Parts [.., D] end to end, as many rows as `like`, zero from `tokens` on. One part that is whole is not copied."""
    missing = like.shape[0] - sum(part.shape[0] for part in parts)
    if missing:
        parts = [*parts, like.new_zeros(missing, *like.shape[1:])]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if tokens < whole.shape[0]:
        whole[tokens:] = 0
    return whole


def _refuse_unsupported(context: BaseInferenceContext) -> None:
    """Prefix caching and speculation need states in the middle of a prompt; without them results would be wrong."""
    if context.mamba_slot_allocator is not None:
        raise UserError("enable_prefix_caching", True, "is not implemented by these mixers", "False")
    if context.num_speculative_tokens:
        raise UserError("num_speculative_tokens", context.num_speculative_tokens, "is not implemented", "0")
