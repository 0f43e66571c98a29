"""Two halves of a pass's tokens in flight: while the sums of one travel, the other's products run.

A layer's output is summed over the ranks, added to the residual stream and normed before the next layer reads it, which
leaves the GPU's products idle for as long as that takes. Halves of the tokens take turns instead:

    products       A1      B1      A2      B2      A3   ..     mixers up to out_proj, in the order of the tokens
    side stream        A1      B1      A2      B2              reduction, addition, the next layer's norm

Where the middle of the tokens is in the middle of a prompt, the second half begins with the states that the first has
left in the prompt's slots in the same layer, as chunks of a prompt do from one pass to the next.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from megatron.core.inference.contexts import BaseInferenceContext

from .layer import MixerLayer
from .norm import LocalRMSNorm
from .pass_context import Counts, PassContext, Slots
from .side_stream import SideStream

NEAR = 8  # a prompt's end is taken for the middle within an eighth of the tokens
TILE = 128  # tokens that products take at a time


def prompt_lengths(context: BaseInferenceContext) -> list[int] | None:
    """Tokens of each prompt, or part of one, of this pass, as the host knows them; None if it does not."""
    if isinstance(context, PassContext):
        return None if context.lengths is None else list(context.lengths)
    counts = context.batch_dimensions
    first = context.paused_request_count + counts.decode_req_count
    lengths = context.request_query_lengths[first : context.total_request_count].tolist()
    known = len(lengths) == counts.prefill_req_count and sum(lengths) == counts.token_count - counts.decode_req_count
    return lengths if known else None


def middle(lengths: Sequence[int]) -> int:
    """How many tokens of prompts, end to end, come first: half of them, or what ends with a prompt and is near that."""
    whole = sum(lengths)
    nearest = min(accumulate(lengths), key=lambda end: abs(2 * end - whole), default=0)
    if abs(2 * nearest - whole) * NEAR <= 2 * whole:
        return nearest
    return whole // 2 // TILE * TILE or whole // 2


def halves(context: BaseInferenceContext, lengths: Sequence[int]) -> list[tuple[slice, PassContext]]:
    """Tokens of each half, and their context; the first has all decoding requests, the second all padding."""
    counts, metadata = context.batch_dimensions, context.mamba_metadata
    decodes, cut = counts.decode_req_count, middle(lengths)
    spans = list(zip(accumulate(lengths), lengths, strict=True))
    begun = sum(end - length < cut for end, length in spans)
    over = sum(end <= cut for end, _ in spans)
    slots, cu_seqlens = metadata.batch_indices_prefill, metadata.cu_seqlens
    first = PassContext(
        context,
        Counts(decodes, begun, decodes + cut),
        Slots(metadata.batch_indices_decode, slots[:begun], cu_seqlens[: begun + 1].clamp(max=cut)),
        [min(end, cut) - (end - length) for end, length in spans[:begun]],
    )
    second = PassContext(
        context,
        Counts(0, len(lengths) - over, counts.token_count - decodes - cut),
        Slots(
            None,
            slots[over : len(lengths)],
            (cu_seqlens[over : len(lengths) + 1] - cut).clamp(min=0),
        ),
        [end - max(cut, end - length) for end, length in spans[over:]],
    )
    return [(slice(0, decodes + cut), first), (slice(decodes + cut, None), second)]


class _Half:
    """Where a half stands: its residual stream and the norm of it, and when the side stream has made them.

    What one CUDA stream allocates and another reads is kept until the first has waited for the second: the allocator
    would give its memory away at once.
    """

    def __init__(self, hidden_states: torch.Tensor, normed: torch.Tensor, context: PassContext, side: SideStream):
        self.hidden_states, self.normed, self.context, self.side = hidden_states, normed, context, side
        self.made: torch.cuda.Event | None = None
        self.kept: tuple[torch.Tensor, ...] = ()

    def pass_through(self, layer: MixerLayer, following: LocalRMSNorm) -> None:
        self.wait()
        partial = layer.partial(self.normed, self.context)
        with self.side.behind_current():
            given = self.hidden_states
            self.hidden_states, self.normed = layer.sum_and_norm(partial, given, following)
        self.made = self.side.made()
        self.kept = (partial, given)

    def wait(self) -> None:
        """Have the stream that products run on wait for what the side stream has made."""
        if self.made is not None:
            self.made.wait()
        self.kept = ()


def forward_in_halves(
    layers: Sequence[MixerLayer],
    final_norm: LocalRMSNorm,
    hidden_states: torch.Tensor,
    context: BaseInferenceContext,
    lengths: Sequence[int],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The layers, each with the norm that follows it: [l, 1, h] -> of each half the stream [.., 1, h] and its norm.

    Every layer's mixer is an SSM's, and what it reduces before out_proj goes by no recipe, whose buffers out_proj's
    reduction uses meanwhile. Without recipes both are NCCL's, of one communicator, and wait for each other.
    """
    side, normed = SideStream(hidden_states.device), layers[0].norm(hidden_states.to(final_norm.weight.dtype))
    both = [_Half(hidden_states[tokens], normed[tokens], half, side) for tokens, half in halves(context, lengths)]
    followings = [*(layer.norm for layer in layers[1:]), final_norm]
    for layer, following in zip(layers, followings, strict=True):
        for half in both:
            half.pass_through(layer, following)
    for half in both:
        half.wait()
        yield half.hidden_states, half.normed
