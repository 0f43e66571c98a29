"""What ranks are asked about calls of which each makes its own."""

from pathlib import Path

import jobs
from engine_jobs import LIMITS

from megatron_ssm_tp import LLM, SamplingParams, UserError


def error_of_loading(path: Path, each: list[dict]) -> str:
    """The message of the UserError that loading by the arguments of its number raises on each rank."""
    try:
        LLM.from_pretrained(path, **each[jobs.groups().tp.rank()])
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def error_of_states(path: Path, befores: list[list[int] | None]) -> str:
    """The message where each rank goes on with the state after a prompt of its own, or with none."""
    model, mine = jobs.llm(path, **LIMITS), befores[jobs.groups().tp.rank()]
    params = SamplingParams(temperature=0, num_tokens_to_generate=2, termination_id=-1)
    outputs = [before and model.generate([before], params, return_states=True)[0] for before in befores]
    given = mine and outputs[befores.index(mine)].state
    try:
        model.generate([[1, 2]], params, states=[given])
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def sampled_by(path: Path, each: list[dict]) -> list[int]:
    """An answer whose parameters every rank has been given in its own way."""
    params = SamplingParams(temperature=1.0, num_tokens_to_generate=12, termination_id=-1)
    params.add_attributes(each[jobs.groups().tp.rank()])
    return jobs.llm(path, **LIMITS).generate([[1, 2, 3]], params)[0].token_ids


def error_of_saving(path: Path, folder: Path, without: int) -> str:
    """The message of a state that one rank does not hand in."""
    model = jobs.llm(path, **LIMITS)
    params = SamplingParams(temperature=0, num_tokens_to_generate=2, termination_id=-1)
    state = model.generate([[1, 2]], params, return_states=True)[0].state
    try:
        model.save_state(None if jobs.groups().tp.rank() == without else state, folder)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")
