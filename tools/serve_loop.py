"""A server's loop around our engine: requests come, are cancelled, and answered, alike on all ranks."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter, sleep
from typing import NamedTuple

import torch
import torch.distributed as dist
from serve_load import Arrival, read

from megatron_ssm_tp.inference.engine import SlotEngine
from megatron_ssm_tp.inference.prompts import Reader

_NAP = 0.001  # s, without work


class Answered(NamedTuple):
    """Tokens of prompt and answer; when the request came, and its first and last token, in seconds."""

    prompt: int
    tokens: int
    came: float
    first: float
    last: float


@dataclass
class Served:
    """What came of a load.

    Args:
        refused: how often, by the field that was wrong.
        idle: seconds without a request.
        longest_wait: seconds in which there were requests and no token came, at most.
    """

    answers: list[Answered] = field(default_factory=list)
    accepted: int = 0
    cancelled: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    idle: float = 0.0
    longest_wait: float = 0.0

    def __add__(self, other: "Served") -> "Served":
        return Served(
            self.answers + other.answers,
            self.accepted + other.accepted,
            self.cancelled + other.cancelled,
            self.refused + other.refused,
            self.seconds + other.seconds,
            self.idle + other.idle,
            max(self.longest_wait, other.longest_wait),
        )


class Serving:
    """Serves loads, one after another.

    Args:
        reader: of arrivals, which refuses what is wrong.
        group: the ranks, which serve together: rank 0's clock is told to all before every step, by gloo.
    """

    def __init__(self, engine: SlotEngine, reader: Reader, group: dist.ProcessGroup) -> None:
        self._engine, self._reader, self._rank = engine, reader, group.rank()
        self._clock_group = dist.new_group(backend="gloo") if group.size() > 1 else None

    def run(self, arrivals: Iterator[Arrival], seconds: float) -> Served:
        """Serve what arrives in so many seconds to its end."""
        served, began, numbers = Served(), perf_counter(), count()
        coming, steps, last_token = next(arrivals), 0, 0.0
        came: dict[int, tuple[Arrival, int]] = {}  # by number, with the step before which they give up
        first: dict[int, float] = {}
        with self._engine.alone():
            while True:
                now = self._now(began)
                while coming.at <= min(now, seconds):
                    request = read(self._reader, coming)
                    if isinstance(request, str):
                        served.refused[request] += 1
                    else:
                        index = next(numbers)
                        patience = steps + coming.give_up_after if coming.give_up_after else None
                        came[index] = (coming, patience)
                        self._engine.add(index, request)
                        served.accepted += 1
                    coming = next(arrivals)
                for index in [i for i, (_, patience) in came.items() if patience is not None and steps >= patience]:
                    served.cancelled += self._engine.cancel(index)
                    del came[index]
                if not self._engine.has_unfinished:
                    if coming.at > seconds:
                        break
                    sleep(_NAP)
                    served.idle += self._now(began) - now
                    last_token = self._now(began)
                    continue
                progress, steps = self._engine.step(), steps + 1
                seen = self._now(began)
                served.longest_wait = max(served.longest_wait, seen - last_token)
                last_token = seen if progress else last_token
                for found in progress:
                    first.setdefault(found.index, seen)
                    if found.finished:
                        arrival, _ = came.pop(found.index)
                        sizes = len(arrival.prompt), len(found.token_ids)
                        served.answers.append(Answered(*sizes, arrival.at, first[found.index], seen))
        served.seconds = self._now(began)
        return served

    def _now(self, began: float) -> float:
        """Seconds since, by rank 0's clock."""
        now = torch.tensor(perf_counter() - began, dtype=torch.float64)
        if self._clock_group is not None:
            dist.broadcast(now, 0, group=self._clock_group)
        return now.item()
