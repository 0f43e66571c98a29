"""Our own engine, for models whose layers are all SSMs: continuous batching over slots of constant size.

    waiting --admitted to a free slot--> reading its prompt, a part a pass --> decoding, in bursts --> over

The host decides by counts alone, which every rank has alike, and never waits for the device before the next pass or
burst is launched: what a burst has generated is looked at while the one after it runs. An answer that ends by a token
is masked on the device; one that ends by text is ended by the host, and what was generated behind it thrown away.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core.inference.engines import AbstractEngine

from ..layers.model import SSMModel
from .conversation import ConversationState
from .decoder import Decoder, Emitted
from .graphs import Graphs
from .modes import OneRun, inference_active
from .passes import Passes
from .prefix_cache import PrefixCache
from .requests import Progress, Request
from .running import Bursts, Running, needs_of
from .slots import SlotTable
from .small_sums import SmallSums


class SlotEngine(OneRun, AbstractEngine):
    """Requests in, tokens out. Every tensor-parallel rank makes the same calls in the same order.

    Args:
        model: whose layers are all SSMs.
        max_tokens: of prompts in a pass; longer ones are read in parts.
        bursts: None is what suits the device.
        prefixes: states after prefixes that prompts share are kept there; None: nowhere.
        seed: requests that bring none get theirs from it and their number since.
    """

    name = "slots"

    def __init__(
        self,
        model: SSMModel,
        table: SlotTable,
        max_tokens: int,
        bursts: Bursts | None = None,
        seed: int = 0,
        prefixes: PrefixCache | None = None,
    ) -> None:
        super().__init__()
        self.model, self.table, self.max_tokens, self.prefixes = model, table, max_tokens, prefixes
        self.bursts = bursts or Bursts.on(table.device)
        graphs = Graphs(table.device) if self.bursts.graphs and table.device.type == "cuda" else None
        self.sums = SmallSums(model, table.device)
        self.passes = Passes(model, table, self.sums, graphs)
        self.decoder = Decoder(model, table, self.bursts.longest, self.sums, graphs)
        self._seed, self._ordinals = seed, itertools.count()
        self._unfinished: dict[
            int, Running
        ] = {}  # by index; the queues below have those that something is left to do for
        self._waiting: deque[Running] = deque()
        self._reading: deque[Running] = deque()
        self._decoding: list[Running] = []
        self.free_slots = list(range(table.slots))[::-1]
        self._in_flight: deque[tuple[Emitted, list[Running]]] = deque()

    def close(self) -> None:
        """Nothing to let go of that memory management does not."""

    def generate(self, requests: Sequence[Request]) -> dict:
        """AbstractEngine's: all answers, as Progress by the requests' places."""
        return {progress.index: progress for progress in self.run(requests) if progress.finished}

    def run(
        self,
        requests: Sequence[Request],
        around_step: Callable[[], AbstractContextManager] = nullcontext,
        seed: int | None = None,
    ) -> Iterator[Progress]:
        """Step until all requests are answered; yields each one's state whenever it has changed.

        Args:
            seed: restarts the numbers that seeds come from. Each step runs inside `around_step()`.

        Abandoned midway, or left by an error, it drops what is left.

        Raises:
            UserError: another run is not over.
        """
        with self.alone():
            if seed is not None:
                self._seed, self._ordinals = seed, itertools.count()
            try:
                for index, request in enumerate(requests):
                    self.add(index, request)
                while self.has_unfinished:
                    with around_step():
                        changes = self.step()
                    yield from changes
            finally:
                self.reset()

    def warm_up(self) -> None:
        """Have kernels compiled and all CUDA graphs made, so that no request waits for them; on CPUs nothing."""
        if self.table.device.type == "cpu":
            return
        with self.alone(), inference_active(), torch.inference_mode():
            self.passes.warm_up(self.max_tokens)
            self.decoder.warm_up()

    # Requests that come and go one by one

    @property
    def has_unfinished(self) -> bool:
        return bool(self._unfinished)

    def add(self, index: int, request: Request) -> None:
        """Have `request` answered; its Progress bears `index`, which no unfinished one may have."""
        self._unfinished[index] = running = Running(index, request, next(self._ordinals))
        self._waiting.append(running)

    def stage(self, index: int) -> str | None:
        """What the request of that index is at: "waiting", "reading" or "decoding"; None if none is unfinished."""
        return self._unfinished[index].stage if index in self._unfinished else None

    def cancel(self, index: int) -> bool:
        """Forget the request of that index; whether there was one. No Progress comes of it any more."""
        if index not in self._unfinished:
            return False
        self._end(self._unfinished[index])
        return True

    def reset(self) -> None:
        """Forget all requests."""
        for running in list(self._unfinished.values()):
            self._end(running)
        self._in_flight.clear()

    def step(self) -> list[Progress]:
        """Launch a pass over prompts and a burst, if there is something to launch, and tell what has come meanwhile."""
        found: list[Progress] = []
        with inference_active(), torch.inference_mode():
            self._admit()
            launched = self._read()
            if not self.bursts.ahead:
                while self._in_flight:
                    found += self._look()
                if found:
                    return found  # first tokens do not wait for the burst behind them
            launched |= self._decode()
        while self._in_flight and len(self._in_flight) > (self.bursts.ahead if launched else 0):
            found += self._look()
            if not launched:
                break
        return found

    def _admit(self) -> None:
        while self._waiting and self.free_slots:
            running = self._waiting.popleft()
            running.slot = self.free_slots.pop()
            request = running.request
            states = request.state.snapshot if request.state else None
            if self.prefixes is not None and states is None:
                running.made_by = self.sums.asked()
                running.read, states = self.prefixes.find(running.prompt, running.made_by)
                parting = self.prefixes.parting(running.prompt, running.read, running.made_by)
                running.keep_at = len(running.prompt) if request.keep_state else parting
            sampling, end_ids = running.sampling(self._seed), sorted(request.stop.end_ids)
            self.table.begin(running.slot, running.conversation, sampling, running.limit, end_ids, states)
            self._reading.append(running)

    def _read(self) -> bool:
        """A pass over the next parts of prompts, in their order; the first token of those that are at their end."""
        parts, room = [], self.max_tokens
        while self._reading and room:
            running = self._reading[0]
            end = running.keep_at if running.read < running.keep_at else len(running.prompt)
            length = min(room, end - running.read)
            parts.append((running, running.prompt[running.read : running.read + length]))
            running.read, room = running.read + length, room - length
            if running.read < len(running.prompt):
                break
            self._reading.popleft()
        if parts:
            self._pass_over(parts)
        return bool(parts)

    def _pass_over(self, parts: list[tuple[Running, Sequence[int]]]) -> None:
        # Only of the last may a part be left; logits of some token are made even then.
        done = [running for running, _ in parts if running.read == len(running.prompt)]
        logits, slots = self.passes.logits([(running.slot, part) for running, part in parts], max(1, len(done)))
        for running, _ in parts:
            kept_here = running.keep_at and running.read == running.keep_at
            if kept_here and running.made_by == self.sums.asked():  # as when it was admitted
                states = self.table.snapshot(running.slot)
                self.prefixes.keep(running.prompt[: running.read], states, running.made_by)
        if not done:
            return
        for running in done:
            if running.request.return_state and not running.device_sees_end:
                running.after_prompt = self.table.snapshot(running.slot)
        needs = needs_of(done)
        chosen, log_probs = self.table.choose(logits, slots[: len(done)], needs)
        emitted = self.decoder.emitted(chosen[None], None if log_probs is None else log_probs[None])
        self._launched(emitted, done, 1)
        self._decoding += [running for running in done if running.launched < running.limit]

    def _decode(self) -> bool:
        """A burst of all that decode."""
        rows = self._decoding
        if not rows:
            return False
        left = [running.limit - running.launched for running in rows]
        # Who waits for a slot gets it as soon as one may be free.
        steps = min(self.bursts.longest, min(left) if self._waiting else max(left))
        if self._reading:
            steps = min(steps, self.bursts.while_reading)
        emitted = self.decoder.burst([running.slot for running in rows], steps, needs_of(rows))
        self._launched(emitted, rows, steps)
        self._decoding = [running for running in rows if running.launched < running.limit]
        return True

    def _launched(self, emitted: Emitted, rows: list[Running], steps: int) -> None:
        for running in rows:
            running.launched += steps
        self._in_flight.append((emitted, rows))

    def _look(self) -> list[Progress]:
        """What the oldest pass or burst that is under way has generated."""
        emitted, rows = self._in_flight.popleft()
        emitted.wait()
        tokens, log_probs = emitted.tokens.tolist(), emitted.log_probs
        log_probs = log_probs.tolist() if log_probs is not None else [[None] * len(rows)] * len(tokens)
        found = []
        for row, running in enumerate(rows):
            before = len(running.tokens)
            for token, log_prob in ((tokens[step][row], log_probs[step][row]) for step in range(len(tokens))):
                if running.over:
                    break
                running.tokens.append(token)
                running.log_probs.append(log_prob)
                if running.request.stop.ends(running.tokens) or len(running.tokens) == running.limit:
                    if running.request.return_state:
                        running.state = self._state_after(running)
                    self._end(running)
            if len(running.tokens) > before:
                found.append(running.progress())
        return found

    def _state_after(self, running: Running) -> ConversationState:
        """Of an answer that has ended. Where the device went on behind its end, the answer is read again."""
        if not running.device_sees_end and running.launched > len(running.tokens):
            self.table.restore(running.slot, running.after_prompt)
            answer = running.tokens[:-1]
            with inference_active(), torch.inference_mode():
                for begin in range(0, len(answer), self.max_tokens):
                    self.passes.logits([(running.slot, answer[begin : begin + self.max_tokens])], 1)
        return ConversationState([*running.conversation, *running.tokens], self.table.snapshot(running.slot))

    def _end(self, running: Running) -> None:
        running.over = True
        del self._unfinished[running.index]
        for queue in (self._waiting, self._reading, self._decoding):
            if running in queue:
                queue.remove(running)
        if running.slot >= 0:
            self.table.end(running.slot)
            self.free_slots.append(running.slot)
