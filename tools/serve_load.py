"""Requests for bench_inference.py serve: when they come, what they ask for, which of them are wrong or given up."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from math import exp, inf, log
from typing import NamedTuple

import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.inference.prompts import Reader
from megatron_ssm_tp.inference.requests import Request
from megatron_ssm_tp.inference.slots import END_IDS
from megatron_ssm_tp.inference.stopping import StopCondition

WRONG = 0.08  # of a soak's requests
GIVEN_UP = 0.15
BEGINNINGS = 3  # of a soak's prompts
PATIENCE = {"waiting": 3, "reading": 3, "decoding": 20}  # steps in a stage, fewer than which a request gives up after


class Arrival(NamedTuple):
    """A request that comes `at` seconds.

    Args:
        gives_up: a stage of the engine's, and after how many steps in it the request is cancelled.
        wrong: the field for which it is to be refused.
        end_ids: tokens that end the answer, more than the device looks for; none: as `params` say.
        returns_state: the state after the answer is asked for.
    """

    at: float
    prompt: list[int]
    params: SamplingParams
    gives_up: tuple[str, int] | None = None
    wrong: str | None = None
    end_ids: frozenset[int] = frozenset()
    returns_state: bool = False


class Load:
    """A Poisson load, the same on every rank for the same seed.

    Args:
        rate: requests a second.
        prompt_tokens, new_tokens: least and most; lengths between them are log-uniform.
        mixed: sample in all ways, give some up, mix in wrong ones, begin prompts alike, end by many tokens, and ask for
            states.
    """

    def __init__(
        self,
        rate: float,
        prompt_tokens: tuple[int, int],
        new_tokens: tuple[int, int],
        vocab_size: int,
        seed: int,
        mixed: bool,
    ) -> None:
        self._rate, self._prompt_tokens, self._new_tokens = rate, prompt_tokens, new_tokens
        self._vocab_size, self._mixed = vocab_size, mixed
        self._draw, self._generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self._beginnings = [self._tokens(prompt_tokens[1]) for _ in range(BEGINNINGS)]

    def arrivals(self, seconds: float = inf, requests: int | None = None) -> Iterator[Arrival]:
        """Those of so many seconds, or so many; without end if neither is given."""
        at = 0.0
        for _ in count() if requests is None else range(requests):
            at += self._draw.expovariate(self._rate)
            if at > seconds:
                return
            tokens = self._length(self._new_tokens)
            prompt, wrong = self._prompt(self._length(self._prompt_tokens)), None
            params = self._params(tokens)
            if self._mixed and self._draw.random() < WRONG:
                prompt, wrong = self._spoilt(prompt, params)
            gives_up = None
            if self._mixed and self._draw.random() < GIVEN_UP:
                stage = self._draw.choice(list(PATIENCE))
                gives_up = stage, self._draw.randrange(PATIENCE[stage])
            end_ids, returns_state = frozenset(), False
            if self._mixed:
                many = self._draw.random() < 0.2
                end_ids = frozenset(self._tokens(4 * END_IDS)) if many else end_ids
                returns_state = self._draw.random() < 0.2
            yield Arrival(at, prompt, params, gives_up, wrong, end_ids, returns_state)

    def _prompt(self, length: int) -> list[int]:
        own = self._tokens(length)
        if not self._mixed or self._draw.random() < 0.5:
            return own
        shared = length * 3 // 4
        return self._draw.choice(self._beginnings)[:shared] + own[shared:]

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(0, self._vocab_size, (count,), generator=self._generator).tolist()

    def _length(self, bounds: tuple[int, int]) -> int:
        low, high = log(bounds[0]), log(bounds[1] + 1)
        return min(bounds[1], int(exp(low + (high - low) * self._draw.random())))

    def _params(self, tokens: int) -> SamplingParams:
        params = SamplingParams(temperature=0.0, num_tokens_to_generate=tokens, termination_id=-1)
        if not self._mixed:
            return params
        draw = self._draw
        ways = [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_k": 40}, {"temperature": 0.9, "top_p": 0.9}]
        for name, value in draw.choice(ways).items():
            setattr(params, name, value)
        more = [{}, {"min_p": 0.05}, {"repetition_penalty": 1.2}, {"seed": draw.randrange(1 << 30)}]
        params.add_attributes(draw.choice(more))
        params.return_log_probs = draw.random() < 0.2
        params.termination_id = draw.choice([-1, draw.randrange(self._vocab_size)])
        return params

    def _spoilt(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
        """The prompt, and the field that is wrong from now on: the prompt, or one of `params`."""
        kind = self._draw.randrange(6)
        if kind < 3:
            most = self._prompt_tokens[1] + self._new_tokens[1]
            return [[], [*prompt, self._vocab_size], [0] * most][kind], "prompts[0]"
        if kind == 3:
            params.num_tokens_to_generate = 1 << 30
            return prompt, "num_tokens_to_generate"
        if kind == 4:
            params.temperature = -1.0
            return prompt, "temperature"
        params.top_k, params.top_p = 5, 0.5
        return prompt, "top_p"


def read(reader: Reader, arrival: Arrival) -> Request | str:
    """The request, or why there is none: the field that is wrong."""
    try:
        [request] = reader.read([arrival.prompt], arrival.params, return_states=arrival.returns_state)
    except UserError as error:
        return error.field
    if not arrival.end_ids:
        return request
    return replace(request, stop=StopCondition(arrival.end_ids, (), False, reader.tokenizer))
