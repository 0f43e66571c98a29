"""Decoding steps of Megatron's engine around our model, every kernel launched or whole passes as its CUDA graphs.

What a launch script gets with `--cuda-graph-impl local --inference-cuda-graph-scope block`; its engine's own work on
the host is part of a step.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter

from bench_models import Ours, draw_tokens
from bench_options import Setting
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.transformer.enums import InferenceCudaGraphScope

from megatron_ssm_tp.inference.megatron_engine import MegatronEngine
from megatron_ssm_tp.inference.prompts import Reader
from megatron_ssm_tp.inference.requests import Limits
from megatron_ssm_tp.inference.state import CacheLimits, inference_config
from megatron_ssm_tp.inference.tokenizer import NoTokenizer

WAYS = {"Megatron's engine": False, "Megatron's engine, its graphs": True}
_PROMPT, _ANSWER, _FIRST = 16, 48, 8  # tokens; of an answer's steps the first are not counted


class MegatronSteps:
    """Megatron's engine around a model of its own, for as many requests as the largest of `batches`."""

    def __init__(self, name: str, setting: Setting, batches: list[int], graphs: bool) -> None:
        overrides = {}
        if graphs:
            overrides = {"cuda_graph_impl": "local", "inference_cuda_graph_scope": InferenceCudaGraphScope.block}
        config = setting.asked.models[name][0]
        ours = Ours(config, setting.groups, setting.device, setting.asked.dtype, _PROMPT + _ANSWER, **overrides)
        length = _PROMPT + _ANSWER
        limits = CacheLimits(max(batches), max(batches) * _PROMPT, length, max_cached_tokens=max(batches) * length)
        cache = inference_config(ours.model, config, limits, setting.groups)
        if graphs:
            cache = replace(cache, num_cuda_graphs=8, use_cuda_graphs_for_non_decode_steps=False)
        words = NoTokenizer(Path(name), config.vocab_size, -1)
        self._engine = MegatronEngine(ours.model, cache, words)
        self._reader = Reader(words, Limits(config.vocab_size, length), (), None)
        self._prompt = draw_tokens(1, _PROMPT, config.vocab_size)[0].tolist()

    def seconds(self, batch: int) -> float:
        """Of a step that decodes `batch` requests, the median."""
        sampling = SamplingParams(temperature=0.0, num_tokens_to_generate=_ANSWER, termination_id=-1)
        requests = self._reader.read([self._prompt] * batch, sampling)
        for _repeat in range(2):
            found = list(self._steps(requests))
        return median(found[_FIRST:])

    def _steps(self, requests: list) -> Iterator[float]:
        """Seconds between the tokens of the last request, which the engine tells after each step."""
        last = inf
        for progress in self._engine.run(requests):
            if progress.index == len(requests) - 1:
                now = perf_counter()
                if last < inf:
                    yield now - last
                last = now

    def close(self) -> None:
        self._engine.close()
