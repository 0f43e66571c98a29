"""What ranks are asked about mistakes: the message that each of them gets."""

from pathlib import Path

import jobs
from megatron.core.inference.sampling_params import SamplingParams

from megatron_ssm_tp import LLM, UserError
from megatron_ssm_tp.ranks import agree


def error_of(path: Path, prompts: object, params: dict | list[dict] | None = None, **limits: int) -> str:
    """The message of the UserError that generating raises."""
    sampling: object = SamplingParams(**(params or {})) if not isinstance(params, list) else None
    if isinstance(params, list):
        sampling = [None if p is None else SamplingParams(**p) for p in params]
    try:
        jobs.llm(path, **limits).generate(prompts, sampling)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def error_with(path: Path, more: dict, engine: str) -> str:
    """The message of the UserError that an engine, or sampling parameters that Megatron has no field for, raise."""
    params = SamplingParams(num_tokens_to_generate=2)
    params.add_attributes(more)
    try:
        jobs.llm(path, engine=engine).generate([[1, 2]], params)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def error_of_different_calls(path: Path, calls: list[tuple[str, tuple, dict]]) -> tuple[str, list[int]]:
    """The message that each rank gets that makes the call of its number; and an answer to what all ask then."""
    llm = jobs.llm(path)
    name, arguments, more = calls[jobs.groups().tp.rank()]
    greedy = SamplingParams(temperature=0, num_tokens_to_generate=4)
    try:
        getattr(llm, name)(*[SamplingParams(**one) if isinstance(one, dict) else one for one in arguments], **more)
    except UserError as error:
        return str(error), llm.generate([[1, 2, 3]], greedy)[0].token_ids
    raise AssertionError("no error")


def logits_error_of(path: Path, token_ids: list[int]) -> str:
    try:
        jobs.llm(path).logits(token_ids)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def error_seen_by_one_rank(path: Path, missing_on: int) -> str:
    """Loading where one rank cannot see the checkpoint: what each rank raises."""
    here = path if jobs.groups().tp.rank() != missing_on else path / "elsewhere"
    try:
        LLM.from_pretrained(here)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def error_of_text(path: Path, tokenizer: Path, text: str) -> str:
    try:
        LLM.from_pretrained(path, tokenizer=tokenizer).generate([text])
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def agree_on_a_bug() -> str:
    group = jobs.groups().tp

    def step() -> None:
        if group.rank() == 1:
            raise KeyError("x")

    try:
        agree(step, group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def error_of_recipes_that_differ(path: Path, recipes: list) -> str:
    try:
        LLM.from_pretrained(path, tp_allreduce=recipes[jobs.groups().tp.rank()])
    except UserError as error:
        return str(error)
    raise AssertionError("no error")
