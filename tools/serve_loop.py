"""A server's loop around our engine: requests come, are cancelled, and answered, alike on all ranks."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from time import perf_counter, sleep
from typing import NamedTuple

import torch
import torch.distributed as dist
from serve_load import Arrival, read

from megatron_ssm_tp.inference.engine import SlotEngine
from megatron_ssm_tp.inference.prompts import Reader
from megatron_ssm_tp.inference.requests import Progress

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
        cancelled: how often, by what the request was at.
        refused: how often, by the field that was wrong.
        misjudged: requests that were taken though wrong, or refused for what was right.
        misled: answers whose state, asked for, is not there or of another conversation.
        idle: seconds without a request.
        longest_wait: seconds that a request was without progress, at most.
    """

    answers: list[Answered] = field(default_factory=list)
    accepted: int = 0
    cancelled: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    misjudged: int = 0
    misled: int = 0
    seconds: float = 0.0
    idle: float = 0.0
    longest_wait: float = 0.0

    def __add__(self, other: "Served") -> "Served":
        return Served(
            self.answers + other.answers,
            self.accepted + other.accepted,
            self.cancelled + other.cancelled,
            self.refused + other.refused,
            self.misjudged + other.misjudged,
            self.misled + other.misled,
            self.seconds + other.seconds,
            self.idle + other.idle,
            max(self.longest_wait, other.longest_wait),
        )


class Clock:
    """Rank 0's, which is told to all ranks of `group` by gloo."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = dist.new_group(backend="gloo") if group.size() > 1 else None

    def since(self, began: float) -> float:
        """Seconds, the same on all ranks: a collective call."""
        now = torch.tensor(perf_counter() - began, dtype=torch.float64)
        if self._group is not None:
            dist.broadcast(now, 0, group=self._group)
        return now.item()


@dataclass
class _Open:
    """A request in the engine.

    Args:
        progress: when there was some last, by the clock of all ranks.
        first: when its first token came, by this rank's.
        at_stage: steps in the stage in which it gives up.
    """

    arrival: Arrival
    progress: float
    first: float | None = None
    at_stage: int = 0


class Serving:
    """Serves a load, once. Before every step the clock is told, and by it alone ranks decide."""

    def __init__(self, engine: SlotEngine, reader: Reader, clock: Clock, arrivals: Iterator[Arrival]) -> None:
        self._engine, self._reader, self._clock, self._arrivals = engine, reader, clock, arrivals
        self._coming, self._served = next(arrivals, None), Served()
        self._open: dict[int, _Open] = {}
        self._changed: list[Progress] = []  # by the step before

    def run(self, stall_seconds: float = inf) -> Served:
        """Serve to the load's end, or until a request is without progress for so long; then all are forgotten."""
        served, self._began, napped_at = self._served, perf_counter(), None
        with self._engine.alone():
            while self._coming or self._open:
                now = self._clock.since(self._began)
                if napped_at is not None:
                    served.idle, napped_at = served.idle + now - napped_at, None
                self._note_progress(now)
                if served.longest_wait > stall_seconds:
                    self._engine.reset()
                    break
                self._admit(now)
                self._give_up()
                if self._engine.has_unfinished:
                    self._step()
                elif self._coming:
                    napped_at = now
                    sleep(_NAP)
                else:
                    break
        served.seconds = perf_counter() - self._began
        return served

    def _note_progress(self, now: float) -> None:
        waited = [now - request.progress for request in self._open.values()]
        self._served.longest_wait = max(self._served.longest_wait, *waited, 0.0)
        for progress in self._changed:
            self._open[progress.index].progress = now
            if progress.finished:
                del self._open[progress.index]
        self._changed = []

    def _admit(self, now: float) -> None:
        """Those that have come."""
        while self._coming and self._coming.at <= now:
            arrival, self._coming = self._coming, next(self._arrivals, None)
            request = read(self._reader, arrival)
            wrong = request if isinstance(request, str) else None
            self._served.misjudged += wrong != arrival.wrong
            if wrong is not None:
                self._served.refused[wrong] += 1
                continue
            self._open[self._served.accepted] = _Open(arrival, now)
            self._engine.add(self._served.accepted, request)
            self._served.accepted += 1

    def _give_up(self) -> None:
        for index, request in list(self._open.items()):
            stage, (gives_up_at, patience) = self._engine.stage(index), request.arrival.gives_up or (None, 0)
            if stage is None or stage != gives_up_at:
                continue
            if request.at_stage >= patience:
                self._served.cancelled[stage] += self._engine.cancel(index)
                del self._open[index]
            request.at_stage += 1

    def _step(self) -> None:
        self._changed = self._engine.step()
        seen = perf_counter() - self._began
        for progress in self._changed:
            request = self._open[progress.index]
            request.first = seen if request.first is None else request.first
            if progress.finished:
                sizes = len(request.arrival.prompt), len(progress.token_ids)
                self._served.answers.append(Answered(*sizes, request.arrival.at, request.first, seen))
                self._served.misled += _states_of(progress) != _states_asked(request.arrival, progress)


def _states_of(progress: Progress) -> list[int] | None:
    """The conversation that an answer's state is of."""
    return None if progress.state is None else progress.state.token_ids


def _states_asked(arrival: Arrival, progress: Progress) -> list[int] | None:
    return [*arrival.prompt, *progress.token_ids] if arrival.returns_state else None
