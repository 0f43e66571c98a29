"""Requests for bench_inference.py serve: when they come, what they ask for, which of them are wrong or given up."""

import random
from collections.abc import Iterator
from math import exp, log
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.inference.prompts import Reader
from megatron_ssm_tp.inference.requests import Limits, Request
from megatron_ssm_tp.inference.slots import SlotTable
from megatron_ssm_tp.inference.tokenizer import NoTokenizer

WRONG = 0.08  # of a soak's requests
GIVEN_UP = 0.15


class Arrival(NamedTuple):
    """A request that comes `at` seconds; `give_up_after` steps it is cancelled, if it is not answered then."""

    at: float
    prompt: list[int]
    params: SamplingParams
    give_up_after: int | None = None


class Load:
    """An endless Poisson load, the same on every rank for the same seed.

    Args:
        rate: requests a second.
        prompt_tokens, new_tokens: least and most; lengths between them are log-uniform.
        mixed: sample in all ways, give some up, and mix in wrong ones.
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

    def arrivals(self) -> Iterator[Arrival]:
        at = 0.0
        while True:
            at += self._draw.expovariate(self._rate)
            count = self._length(self._new_tokens)
            prompt = self._tokens(self._length(self._prompt_tokens))
            params = self._params(count)
            if self._mixed and self._draw.random() < WRONG:
                prompt, params = self._spoilt(prompt, params)
            given_up = self._mixed and self._draw.random() < GIVEN_UP
            yield Arrival(at, prompt, params, self._draw.randrange(1, 40) if given_up else None)

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(0, self._vocab_size, (count,), generator=self._generator).tolist()

    def _length(self, bounds: tuple[int, int]) -> int:
        low, high = log(bounds[0]), log(bounds[1] + 1)
        return min(bounds[1], int(exp(low + (high - low) * self._draw.random())))

    def _params(self, count: int) -> SamplingParams:
        params = SamplingParams(temperature=0.0, num_tokens_to_generate=count, termination_id=-1)
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

    def _spoilt(self, prompt: list[int], params: SamplingParams) -> tuple[list, SamplingParams]:
        """A request that is to be refused."""
        kind = self._draw.randrange(6)
        if kind == 0:
            prompt = []
        elif kind == 1:
            prompt = [*prompt, self._vocab_size]
        elif kind == 2:
            prompt = [0] * (self._prompt_tokens[1] + self._new_tokens[1])
        elif kind == 3:
            params.num_tokens_to_generate = 1 << 30
        elif kind == 4:
            params.temperature = -1.0
        else:
            params.top_k, params.top_p = 5, 0.5
        return prompt, params


def reader(table: SlotTable, vocab_size: int, longest: int) -> Reader:
    """What reads arrivals, as LLM's calls are read."""
    return Reader(NoTokenizer(Path("weights at random"), vocab_size, -1), Limits(vocab_size, longest), (), table)


def read(reader: Reader, arrival: Arrival) -> Request | str:
    """The request, or why there is none: the field that is wrong."""
    try:
        return reader.read([arrival.prompt], arrival.params)[0]
    except UserError as error:
        return error.field
