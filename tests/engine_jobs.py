"""What ranks are asked about our own engine."""

import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import jobs
import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_ssm_tp import Bf16, Int4BlockScaling, Int8BlockScaling, RecipeBook, UserError, allreduce_autocast
from megatron_ssm_tp.comm import backends, mappings
from megatron_ssm_tp.inference.engine import SlotEngine
from megatron_ssm_tp.inference.passes import Passes
from megatron_ssm_tp.inference.prefix_cache import PrefixCache
from megatron_ssm_tp.inference.requests import Limits, Progress, Request, read_params
from megatron_ssm_tp.inference.running import Bursts
from megatron_ssm_tp.inference.sampling import RowParams
from megatron_ssm_tp.inference.small_sums import SmallSums
from megatron_ssm_tp.layers.overlap import set_overlap
from megatron_ssm_tp.layers.row_parallel import set_recipes

LIMITS = {"max_requests": 3, "max_tokens": 32, "max_sequence_length": 512}


def request_of(prompt: list[int], count: int, **more: object) -> Request:
    params = SamplingParams(temperature=more.pop("temperature", 0), num_tokens_to_generate=count)
    params.add_attributes(more)
    return Request(prompt, read_params(params, len(prompt), Limits(101, 512), own_engine=True), jobs.NEVER)


def answers(path: Path, prompts: list[list[int]], counts: list[int], bursts: dict, **more: object) -> list[list[int]]:
    engine = jobs.llm(path, bursts=Bursts(**bursts), **LIMITS).engine
    requests = [request_of(prompt, count, **more) for prompt, count in zip(prompts, counts, strict=True)]
    found = engine.generate(requests)
    assert sorted(engine.free_slots) == [0, 1, 2] and not engine.has_unfinished and not engine.table.alive.any()
    return [found[index].token_ids for index in range(len(prompts))]


def answers_of_padded_passes(path: Path, prompts: list[list[int]], counts: list[int]) -> tuple[list[list[int]], set]:
    """As graphs have them, but launched; and the sizes that there were."""
    engine = jobs.llm(path, bursts=Bursts(longest=3, ahead=1), **LIMITS).engine
    engine.passes, sizes = Passes(engine.model, engine.table, SmallSums(engine.model, engine.table.device), None), set()
    engine.warm_up()

    def padded(parts, count):
        tokens = sum(len(tokens) for _, tokens in parts)
        size = engine.passes.sizes.holding(tokens, len(parts))
        sizes.add(size)
        found = engine.passes.padded(parts, count, *size)
        assert engine.passes._padded[size].context.mamba_metadata.cu_seqlens[-1] == size[0]  # no row is left unwritten
        return found

    with mock.patch.object(engine.passes, "logits", padded):
        requests = [request_of(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        found = engine.generate(requests)
    return [found[index].token_ids for index in range(len(prompts))], sizes


def arriving(path: Path, prompts: list[list[int]], counts: list[int], bursts: dict, seed: int) -> dict[int, list[int]]:
    """Requests that come between steps, and some that are cancelled: the answers of those that are not."""
    draw = random.Random(seed)
    engine: SlotEngine = jobs.llm(path, bursts=Bursts(**bursts), **LIMITS).engine
    left, found, cancelled = list(range(len(prompts))), {}, set()
    with engine.alone():
        while left or engine.has_unfinished:
            while left and draw.random() < 0.4:
                index = left.pop(0)
                engine.add(index, request_of(prompts[index], counts[index]))
                if draw.random() < 0.2:
                    cancelled.add(index)
            found |= {progress.index: progress.token_ids for progress in engine.step() if progress.finished}
            if cancelled and draw.random() < 0.3:
                index = min(cancelled)
                if engine.cancel(index):
                    found[index] = "cancelled"
                cancelled.remove(index)
    assert sorted(engine.free_slots) == [0, 1, 2] and not engine.table.alive.any()
    return found


def changes(path: Path, prompt: list[int], count: int, bursts: dict) -> list[Progress]:
    return list(jobs.llm(path, bursts=Bursts(**bursts), **LIMITS).engine.run([request_of(prompt, count)]))


def sampled(
    path: Path, prompts: list[list[int]], bursts: dict, run_seed: int | None, **more: object
) -> list[list[int]]:
    engine = jobs.llm(path, bursts=Bursts(**bursts), **LIMITS).engine
    requests = [request_of(prompt, 20, temperature=1.0, **more) for prompt in prompts]
    found = {
        progress.index: progress.token_ids for progress in engine.run(requests, seed=run_seed) if progress.finished
    }
    return [found[index] for index in range(len(prompts))]


def abandoned(path: Path, bursts: dict) -> tuple[list[int], int, int]:
    """Slots that are free when a run is left after its first answer, all of its steps being under way; and how many
    passes and bursts are under way before and after."""
    engine = jobs.llm(path, bursts=Bursts(**bursts), **LIMITS).engine
    next(run := engine.run([request_of([1, 2], 6), request_of([3], 6)]))
    under_way = len(engine._in_flight)
    run.close()
    assert not engine.has_unfinished
    return sorted(engine.free_slots), under_way, len(engine._in_flight)


def cancelled_late(path: Path, bursts: dict) -> tuple[bool, bool, list[int]]:
    """Whether a request can be cancelled when all of its steps are under way, and again; what comes of it then."""
    engine = jobs.llm(path, bursts=Bursts(**bursts), **LIMITS).engine
    with engine.alone():
        engine.add(0, request_of([1, 2], 4))
        engine.step()
        said = engine.cancel(0), engine.cancel(0)
        found = [progress.index for _ in range(4) for progress in engine.step()]
        engine.reset()
    return *said, found


def disagreement(path: Path, rank: int, bursts: dict) -> str:
    """One rank's seeds are others: what every rank raises, and whether the engine answers again after it."""
    engine, here = jobs.llm(path, bursts=Bursts(**bursts), **LIMITS).engine, jobs.groups().tp.rank()
    at = RowParams.at

    def other(self: RowParams, rows: torch.Tensor) -> RowParams:
        found = at(self, rows)
        found.seed += here == rank
        return found

    requests = [request_of([1, 2, 3], 12, temperature=5.0)]
    try:
        with mock.patch.object(RowParams, "at", other):
            engine.generate(requests)
    except RuntimeError as error:
        assert sorted(engine.free_slots) == [0, 1, 2] and not engine._in_flight
        again = engine.generate([request_of([1, 2, 3], 4)])
        return f"{error}; then {len(again[0].token_ids)} tokens"
    return "no error"


def emitted_by(path: Path, ranks: list[list[list[int]]]) -> str:
    """What a rank says of tokens [steps, rows], where each rank emits its own."""
    decoder = jobs.llm(path).engine.decoder
    try:
        decoder.emitted(torch.tensor(ranks[jobs.groups().tp.rank()]), None).wait()
    except RuntimeError as error:
        return str(error)
    return "no error"


def launched(path: Path, bursts: dict) -> tuple[set[int], set[int], int]:
    """Steps of bursts while a long prompt is read beside them, and of all others; the most that a step leaves under
    way."""
    engine = jobs.llm(path, bursts=Bursts(**bursts), **LIMITS).engine
    beside, alone, under_way, burst = set(), set(), 0, engine.decoder.burst

    def noting(slots, steps, needs):
        (beside if engine._reading else alone).add(steps)
        return burst(slots, steps, needs)

    with engine.alone(), mock.patch.object(engine.decoder, "burst", noting):
        engine.add(0, request_of([1, 2], 60))
        engine.add(1, request_of([3] * 300, 2))
        while engine.has_unfinished:
            engine.step()
            under_way = max(under_way, len(engine._in_flight))
        engine.reset()
    return beside, alone, under_way


def penalized(path: Path, prompts: list[list[int]], count: int, penalty: float) -> tuple[list, list]:
    """Greedy answers under a repetition penalty: asked for at once, and in halves, the second by the first's states."""
    model, nothing = jobs.llm(path, **LIMITS), [[] for _ in prompts]

    def params(count: int) -> SamplingParams:
        found = SamplingParams(temperature=0, num_tokens_to_generate=count, termination_id=-1)
        found.add_attributes({"repetition_penalty": penalty})
        return found

    whole = [output.token_ids for output in model.generate(prompts, params(count))]
    first = model.generate(prompts, params(count // 2), return_states=True)
    second = model.generate(nothing, params(count - count // 2), states=[output.state for output in first])
    return whole, [one.token_ids + other.token_ids for one, other in zip(first, second, strict=True)]


def legal_bursts() -> Iterator[str]:
    for wrong in ({"longest": 0}, {"while_reading": 1.5}, {"ahead": -1}):
        try:
            Bursts(**wrong)
        except UserError as error:
            yield str(error)


def with_prefixes(path: Path, rounds: list[list[list[int]]], given: list[int] | None, states: int) -> tuple:
    """Answers of several calls with room for so many kept states, the counts after each, and bytes kept and allowed."""
    plain = jobs.llm(path, **LIMITS).engine.table.snapshot(0).nbytes
    model = jobs.llm(path, prefix_bytes=plain * states, **LIMITS)
    model.engine.prefixes = PrefixCache(plain * states)
    if given:
        model.cache_prefix(given)
    found, counts = [], []
    for prompts in rounds:
        params = SamplingParams(temperature=0, num_tokens_to_generate=6, termination_id=-1)
        found.append([output.token_ids for output in model.generate(prompts, params)])
        counts.append((model.prefix_counts().hits, model.prefix_counts().tokens))
    return found, counts, model.engine.prefixes.nbytes // plain, len(model.engine.prefixes)


def prefixes_by_recipe(path: Path, prompt: list[int]) -> tuple:
    """Log-probabilities of an answer without kept prefixes, then with one that was read under int4, and under int4;
    and hits after each."""
    model = jobs.llm(path, prefix_bytes=1 << 20, **LIMITS)
    params = SamplingParams(temperature=0, num_tokens_to_generate=6, termination_id=-1, return_log_probs=True)
    found, hits = [], []

    def ask() -> None:
        found.append(model.generate([[*prompt, 1]], params)[0].logprobs)
        hits.append(model.prefix_counts().hits)

    model.engine.prefixes = PrefixCache(1 << 20)
    ask()
    model.engine.prefixes = PrefixCache(1 << 20)
    with allreduce_autocast(recipe=Int4BlockScaling(block_size=16)):
        model.cache_prefix(prompt)
    ask()
    with allreduce_autocast(recipe=Int4BlockScaling(block_size=16)):
        ask()
    return found, hits


def no_prefixes(path: Path, engine: str) -> str:
    try:
        jobs.llm(path, engine=engine).cache_prefix([1, 2])
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def recipes_of_decoding(path: Path, asked: str) -> list[str]:
    """Names of the recipes that sums follow, where decoding's would follow bf16 unasked."""
    model, seen = jobs.llm(path, "bfloat16", **LIMITS), []
    engine, reduce = model.engine, backends.all_reduce

    def noting(x, group, recipe, *more):
        seen.append(recipe.name)
        return reduce(x, group, recipe, *more)

    contexts = {
        "int8": allreduce_autocast(recipe=Int8BlockScaling(block_size=16)),
        "off": allreduce_autocast(enabled=False),
    }
    if asked in ("model", "none"):
        set_recipes(model.model, Int8BlockScaling(block_size=16) if asked == "model" else "none")
    try:
        with (
            mock.patch.object(engine.sums, "_unasked", RecipeBook.everywhere(Bf16())),
            mock.patch.object(mappings, "all_reduce", noting),
            contexts.get(asked, nullcontext()),
        ):
            engine.generate([request_of([1], 5)])
    finally:
        set_recipes(model.model, None)
    return sorted(set(seen))


def sizes_of_passes(path: Path, way: str, overlap_from: int | None, lengths: list[int]) -> list[tuple[int, int] | None]:
    """Of the graphs for passes over one prompt of each length, where passes may hide reductions."""
    engine = jobs.llm(path, **LIMITS).engine
    set_overlap(engine.model, way, overlap_from)
    try:
        passes = Passes(engine.model, engine.table, engine.sums, None)
        return [passes.size_of([(0, [1] * length)]) for length in lengths]
    finally:
        set_overlap(engine.model, way, None)


def error_of_prefixes(path: Path) -> str:
    try:
        jobs.llm(path, prefix_bytes=1000)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")
