"""What ranks are asked about conversations that go on."""

from dataclasses import replace
from pathlib import Path

import jobs
from engine_jobs import LIMITS

from megatron_ssm_tp import Bursts, SamplingParams, UserError
from megatron_ssm_tp.inference.prefix_cache import PrefixCache
from megatron_ssm_tp.inference.stopping import StopCondition
from megatron_ssm_tp.inference.tokenizer import NoTokenizer

AHEAD = Bursts(longest=5, while_reading=3, ahead=3)


class _Third(StopCondition):
    """Ends an answer at its third token, as a text would: unseen by the device."""

    by_text = True

    def __init__(self) -> None:
        super().__init__(frozenset(), [], False, NoTokenizer(Path(), 101, -1))

    def ends(self, token_ids):
        return len(token_ids) >= 3


def taken_up(path: Path, first: list, then: list, count: int, end_id: int, folder: Path | None, by_text: bool) -> tuple:
    """Answers to `first`, and to `then` after their states, with the conversations that the states are of."""
    model = jobs.llm(path, bursts=AHEAD, **LIMITS)
    params = SamplingParams(temperature=0, num_tokens_to_generate=count, termination_id=end_id)
    requests = model._reader.read(first, params, return_states=True)
    if by_text:
        for request in requests:
            object.__setattr__(request, "stop", _Third())
    pieces = model._run(first, requests, None)
    outputs = sorted((piece.index, piece.output) for piece in pieces if piece.output)
    states = [output.state for _, output in outputs]
    if folder is not None:
        for index, state in enumerate(states):
            model.save_state(state, folder / str(index))
        states = [model.load_state(folder / str(index)) for index in range(len(states))]
    later = SamplingParams(temperature=0, num_tokens_to_generate=8, termination_id=-1)
    after = [output.token_ids for output in model.generate(then, later, states=states)]
    assert sorted(model.engine.free_slots) == [0, 1, 2]
    return [output.token_ids for _, output in outputs], after, [state.token_ids for state in states]


def beside_prefixes(path: Path, first: list[int], then: list[int]) -> tuple[list[int], list[list[int]], int]:
    """The answer to `first`; those to `then` after it by state and to a prompt alike but new, where prefixes of both
    are kept; and hits."""
    model = jobs.llm(path, prefix_bytes=1 << 20, **LIMITS)
    model.engine.prefixes = PrefixCache(1 << 20)
    params = SamplingParams(temperature=0, num_tokens_to_generate=8, termination_id=-1)
    [output] = model.generate([first], params, return_states=True)
    # What is read after a state begins with the last token before it.
    alike = [output.token_ids[-1], *then]
    for prefix in (then[:-1], alike[:-1]):
        model.cache_prefix(prefix)
    before = model.prefix_counts().hits
    found = model.generate([then, alike], params, states=[output.state, None])
    return output.token_ids, [one.token_ids for one in found], model.prefix_counts().hits - before


def errors(path: Path, other: Path, hybrid: Path, folder: Path) -> list[str]:
    """The lines of states that are none, are of other models, are not there or cannot be written."""
    model, another, megatrons = jobs.llm(path, **LIMITS), jobs.llm(other, **LIMITS), jobs.llm(hybrid, **LIMITS)
    params = SamplingParams(temperature=0, num_tokens_to_generate=2)
    state = another.generate([[1]], params, return_states=True)[0].state
    (folder / "file").parent.mkdir(exist_ok=True)
    (folder / "file").write_text("")
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "rank-0-of-1.safetensors").write_text("nothing")
    attempts = [
        lambda: model.generate([[1]], params, states=[state]),
        lambda: model.generate([[1]], params, states=["state"]),
        lambda: another.generate([[1]], params, states=[replace(state, token_ids=[])]),
        lambda: another.generate([[1]], params, states=[replace(state, token_ids=[1, 5000])]),
        lambda: model.generate([[1], [2]], params, states=[None]),
        lambda: model.generate([[]], params, states=[None]),
        lambda: megatrons.generate([[1]], params, return_states=True),
        lambda: megatrons.generate([[1]], params, states=[state]),
        lambda: model.load_state(folder / "absent"),
        lambda: model.load_state(folder / "broken"),
        lambda: another.save_state(state, folder / "file" / "in"),
        lambda: another.save_state("state", folder / "nothing"),
    ]
    return [_line(attempt, folder) for attempt in attempts]


def _line(attempt, folder: Path) -> str:
    try:
        attempt()
    except UserError as error:
        return str(error).replace(str(folder), "FOLDER")
    return "no error"
