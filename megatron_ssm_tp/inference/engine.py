"""Megatron's DynamicInferenceEngine around our model: continuous batching over slots of state, chunked prefill."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.inference_request import DynamicInferenceRequest, Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode

from ..compat.cpu import megatron_on_cpu
from ..layers.model import SSMModel
from .tokenizer import NoTokenizer, TextTokenizer


@dataclass(frozen=True)
class Progress:
    """What a request has generated after a step; `finished` is set with its last tokens."""

    request_id: int
    token_ids: list[int]
    log_probs: list[float] | None
    finished: bool


@contextmanager
def megatron_inference() -> Iterator[None]:
    """Megatron's process-wide inference flag and, without CUDA, the CPU stand-ins: on inside, off outside."""
    was_active = InferenceMode.is_active()
    with megatron_on_cpu():
        InferenceMode.set_active()
        try:
            yield
        finally:
            if not was_active:
                InferenceMode.unset_active()


class DynamicEngine:
    """Requests in, tokens out, a step at a time. Every tensor-parallel rank makes the same calls in the same order."""

    def __init__(self, model: SSMModel, config: InferenceConfig, tokenizer: TextTokenizer | NoTokenizer) -> None:
        with megatron_inference():
            self.context = DynamicInferenceContext(model.config, config)
            self.controller = TextGenerationController(GPTInferenceWrapper(model, self.context), tokenizer)
            self._engine = DynamicInferenceEngine(self.controller, self.context)

    def seed(self, seed: int) -> None:
        """Restart the sampling generator; the same on every rank."""
        self.controller.sampling_rng.manual_seed(seed)

    def add(self, prompt: list[int], params: SamplingParams, extra_stop_ids: tuple[int, ...] = ()) -> int:
        """Queue a request; returns its id. Validated before: Megatron fails requests silently."""
        request_id = int(next(self._engine.request_counter))
        with megatron_inference():
            self._engine.add_request(request_id, prompt, params)
        request = self._engine.get_request(request_id)
        if request.status == Status.FAILED:
            raise RuntimeError(f"Megatron refused request {request_id}: {request.events[-1]}")
        request.stop_word_ids = (request.stop_word_ids or []) + [[token] for token in extra_stop_ids]
        return request_id

    def run(self, around_step: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[Progress]:
        """Step until no request is left; yields every request's state whenever it has changed.

        Each step runs inside `around_step()`. Abandoned midway, or left by an error, it drops what was queued.
        """
        seen: dict[int, int] = {}
        try:
            while self._engine.has_unfinished_requests():
                with megatron_inference(), torch.inference_mode(), around_step():
                    result = self._engine.step_modern()
                finished = [record[-1] for record in result["finished_request_records"]]
                active = [self._engine.get_request(request_id) for request_id in self._engine.requests]
                yield from self._changes(active, seen, finished=False)
                yield from self._changes(finished, seen, finished=True)
        finally:
            if self._engine.has_unfinished_requests():
                with megatron_inference():
                    self._engine.reset()

    @staticmethod
    def _changes(requests: list[DynamicInferenceRequest], seen: dict[int, int], finished: bool) -> Iterator[Progress]:
        for request in requests:
            count = len(request.generated_tokens)
            if finished or count != seen.get(request.request_id, 0):
                seen[request.request_id] = count
                tokens = [int(token) for token in request.generated_tokens]
                yield Progress(request.request_id, tokens, request.generated_log_probs, finished)
