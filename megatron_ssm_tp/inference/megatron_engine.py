"""Megatron's DynamicInferenceEngine around our model: continuous batching over slots of state, chunked prefill."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.inference_request import DynamicInferenceRequestRecord, Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

from ..compat.cpu import megatron_on_cpu
from ..layers.model import SSMModel
from .modes import OneRun, inference_active
from .requests import Progress, Request
from .tokenizer import NoTokenizer, TextTokenizer


@contextmanager
def megatron_inference() -> Iterator[None]:
    """Megatron's process-wide inference flag and, without CUDA, the CPU stand-ins: on inside, off outside."""
    with megatron_on_cpu(), inference_active():
        yield


class MegatronEngine(OneRun):
    """Requests in, tokens out, a step at a time. Every tensor-parallel rank makes the same calls in the same order."""

    name = "megatron"

    def __init__(self, model: SSMModel, config: InferenceConfig, tokenizer: TextTokenizer | NoTokenizer) -> None:
        super().__init__()
        with megatron_inference():
            self.context = DynamicInferenceContext(model.config, config)
            self.controller = TextGenerationController(GPTInferenceWrapper(model, self.context), tokenizer)
            self._engine = DynamicInferenceEngine(self.controller, self.context)
            # Megatron takes the loop that happens to run while the engine is built.
            self._loop = self._engine._loop = asyncio.new_event_loop()
        self._device = self.context.mamba_ssm_states.device
        self._shown: dict[int, int] = {}

    def close(self) -> None:
        """Let go of the loop; the engine cannot run any more."""
        self._loop.close()

    def run(
        self,
        requests: Sequence[Request],
        around_step: Callable[[], AbstractContextManager] = nullcontext,
        seed: int | None = None,
    ) -> Iterator[Progress]:
        """Step until all requests are answered; yields each one's state whenever it has changed.

        `seed` restarts the sampling generator, the same on every rank. Each step runs inside `around_step()`.
        Abandoned midway, or left by an error, it drops what is left.

        Raises:
            UserError: another run is not over.
        """
        with self.alone():
            if seed is not None:
                self.controller.sampling_rng.manual_seed(seed)
            yield from self._run(requests, around_step)

    def _run(
        self, requests: Sequence[Request], around_step: Callable[[], AbstractContextManager]
    ) -> Iterator[Progress]:
        try:
            ids = {self._add(request): index for index, request in enumerate(requests)}
            while self._engine.has_unfinished_requests():
                with megatron_inference(), torch.inference_mode(), around_step():
                    result = self._step()
                active = [_Answered(entry.record) for entry in self._engine.requests.values()]
                finished = [_Answered(record) for record in result["finished_request_records"]]
                self._end_early(active, requests, ids)
                yield from self._changes(active, finished, ids)
        finally:
            self._shown.clear()
            if self._engine.has_unfinished_requests():
                with megatron_inference():
                    self._engine.reset()

    def _step(self) -> dict:
        """One step of Megatron's coroutine, on a loop of our own: the caller's may be running, or closed, or gone."""
        step = self._engine.async_step()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._loop.run_until_complete(step)
        with ThreadPoolExecutor(max_workers=1, initializer=self._on_same_device) as thread:
            # With the caller's context variables: an allreduce_autocast around the call is one.
            return thread.submit(copy_context().run, self._loop.run_until_complete, step).result()

    def _on_same_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _add(self, request: Request) -> int:
        request_id = int(next(self._engine.request_counter))
        with megatron_inference():
            self._engine.add_request(request_id, request.prompt, request.params)
        added = self._engine.get_request(request_id)
        if added.status == Status.FAILED:
            raise RuntimeError(f"Megatron refused request {request_id}: {added.events[-1]}")
        return request_id

    def _end_early(self, active: list["_Answered"], requests: Sequence[Request], ids: dict[int, int]) -> None:
        """Have Megatron end what is over: it knows one end token and matches stop words by tokens, we know more."""
        for request in active:
            if requests[ids[request.request_id]].stop.ends(request.token_ids):
                self._engine.stop_word_finished_request_ids.add(request.request_id)

    def _changes(
        self, active: list["_Answered"], finished: list["_Answered"], ids: dict[int, int]
    ) -> Iterator[Progress]:
        for request, is_last in [*((r, False) for r in active), *((r, True) for r in finished)]:
            count = len(request.token_ids)
            if is_last or count != self._shown.get(request.request_id, 0):
                self._shown[request.request_id] = count
                tokens = [int(token) for token in request.token_ids]
                yield Progress(ids[request.request_id], tokens, request.log_probs, is_last)


class _Answered:
    """What a request has generated. Megatron begins it anew, with its answer so far as prompt, when it is put back for
    want of room; the record has all of these."""

    def __init__(self, record: DynamicInferenceRequestRecord) -> None:
        parts = record.requests
        self.request_id = record.request_id
        self.token_ids = [token for part in parts for token in part.generated_tokens]
        log_probs = [value for part in parts for value in part.generated_log_probs or ()]
        self.log_probs = log_probs if parts[0].sampling_params.return_log_probs else None
