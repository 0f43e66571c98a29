"""What goes into generation and what comes out: checked prompts and parameters, outputs."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.inference.sampling_params import SamplingParams

from ..errors import UserError
from .tokenizer import NoTokenizer, TextTokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class GenerationOutput:
    """One prompt's answer.

    Attributes:
        prompt: the text given, or None for token ids.
        prompt_token_ids, token_ids: what was read and what was generated, an end-of-text token included.
        text: the generated tokens as text, special tokens left out; empty without a tokenizer.
        logprobs: natural logarithm of each generated token's probability, if return_log_probs was set.
        finish_reason: "stop" (end of text or a stop word) or "length".
        ttft: seconds from the call to the first token; tpot: mean seconds for each token after it, None for one token.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: str
    ttft: float
    tpot: float | None


@dataclass(frozen=True)
class Limits:
    """What prompts and parameters are checked against."""

    vocab_size: int
    max_sequence_length: int


def check_token_ids(field: str, token_ids: Sequence[int], limits: Limits) -> list[int]:
    """The ids as a list. Raises UserError if there are none, too many, or one that is no id of the vocabulary."""
    ids = list(token_ids)
    if not ids:
        raise UserError(field, token_ids, "is empty", "at least one token")
    wrong = next((token for token in ids if not isinstance(token, int) or isinstance(token, bool)), None)
    if wrong is not None:
        raise UserError(field, wrong, "is not a token id", f"integers from 0 to {limits.vocab_size - 1}")
    outside = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
    if outside is not None:
        raise UserError(field, outside, "is out of the vocabulary", f"0 to {limits.vocab_size - 1}")
    return ids


def read_prompt(
    field: str, prompt: Prompt, params: SamplingParams, tokenizer: TextTokenizer | NoTokenizer, limits: Limits
) -> list[int]:
    """A prompt's token ids.

    Raises:
        UserError: empty, too long to leave room for a token, not of the vocabulary, or text without a tokenizer.
    """
    if isinstance(prompt, str):
        ids = tokenizer.tokenize(prompt)
        if not ids:
            raise UserError(field, prompt, "is empty", "at least one token")
    else:
        ids = check_token_ids(field, prompt, limits)
    if params.add_BOS and tokenizer.bos is not None and ids[0] != tokenizer.bos:
        ids = [tokenizer.bos, *ids]
    if len(ids) >= limits.max_sequence_length:
        legal = f"at most {limits.max_sequence_length - 1} tokens (max_sequence_length less one to generate)"
        raise UserError(field, f"{len(ids)} tokens", "is longer than the maximum", legal)
    return ids


def read_params(params: SamplingParams, prompt_length: int, vocab_size: int, limits: Limits) -> SamplingParams:
    """A checked copy: temperature 0 becomes greedy, the token count is set, prompt log-probs are off.

    Raises:
        UserError: a field out of its range, or top_k and top_p together.
    """
    params = copy.deepcopy(params)
    temperature, top_k, top_p = params.temperature, params.top_k, params.top_p
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < float("inf"):
        raise UserError("temperature", temperature, "is out of range", "0 (greedy) or a positive number")
    if not isinstance(top_k, int) or not 0 <= top_k < vocab_size:
        raise UserError("top_k", top_k, "is out of range", f"0 (off) to {vocab_size - 1}")
    if not isinstance(top_p, (int, float)) or not 0 <= top_p <= 1:
        raise UserError("top_p", top_p, "is out of range", "0 (off) to 1")
    if top_k and top_p:
        raise UserError("top_p", top_p, f"cannot go with top_k={top_k}", "one of the two")
    if temperature == 0:
        params.temperature, params.top_k, params.top_p = 1.0, 1, 0.0
    params.temperature, params.top_p = float(params.temperature), float(params.top_p)
    params.num_tokens_to_generate = _tokens_to_generate(params, prompt_length, limits)
    params.num_tokens_total = None
    params.skip_prompt_log_probs = True
    return params


def _tokens_to_generate(params: SamplingParams, prompt_length: int, limits: Limits) -> int:
    room = limits.max_sequence_length - prompt_length
    if params.num_tokens_total is not None:
        if params.num_tokens_to_generate is not None:
            raise UserError("num_tokens_total", params.num_tokens_total, "cannot go with num_tokens_to_generate", "one")
        field, wanted = "num_tokens_total", params.num_tokens_total - prompt_length
    else:
        field, wanted = "num_tokens_to_generate", params.num_tokens_to_generate
    if wanted is None:
        return room
    if not isinstance(wanted, int) or not 1 <= wanted <= room:
        legal = f"1 to {room} new tokens after {prompt_length} of prompt (max_sequence_length)"
        raise UserError(field, getattr(params, field), "is out of range", legal)
    return wanted
