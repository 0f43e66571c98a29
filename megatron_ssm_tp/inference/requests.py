"""What goes into generation and what comes out: checked prompts and parameters, outputs."""

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real

from megatron.core.inference.sampling_params import SamplingParams

from ..errors import UserError
from .conversation import ConversationState
from .stopping import StopCondition
from .tokenizer import NoTokenizer, TextTokenizer

Prompt = str | Sequence[int]
# What Megatron's class has, and what it is given by add_attributes.
_PARAMETERS = (*(field.name for field in fields(SamplingParams)), "min_p", "repetition_penalty", "seed")

_HOTTEST = 1e38  # of temperatures, which are kept in float32


@dataclass(frozen=True)
class GenerationOutput:
    """One prompt's answer.

    Attributes:
        prompt: the text given, or None for token ids.
        prompt_token_ids, token_ids: what was read and what was generated, an end-of-text token included.
        text: the generated tokens as text, special tokens and what a stop word cuts off left out; empty without a
            tokenizer.
        logprobs: natural logarithm of each generated token's probability, if return_log_probs was set.
        finish_reason: "stop" (end of text or a stop word) or "length".
        ttft: seconds from the call to the first token; tpot: mean seconds for each token after it, None for one token.
        state: what another request may go on from, if it was asked for.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: str
    ttft: float
    tpot: float | None
    state: ConversationState | None = None


@dataclass(frozen=True)
class Request:
    """A prompt to continue, checked: engines do not.

    Args:
        stop: when its answer is over early.
        keep_state: have the states after all of the prompt kept, as a prefix's.
        state: of the conversation that the prompt goes on with; return_state: have the answer's returned.
    """

    prompt: list[int]
    params: SamplingParams
    stop: StopCondition
    keep_state: bool = False
    state: ConversationState | None = None
    return_state: bool = False


@dataclass(frozen=True)
class Progress:
    """What request `index` has generated after a step; `finished` is set with its last tokens."""

    index: int
    token_ids: list[int]
    log_probs: list[float] | None
    finished: bool
    state: ConversationState | None = None


@dataclass(frozen=True)
class Limits:
    """What prompts and parameters are checked against."""

    vocab_size: int
    max_sequence_length: int


def check_token_ids(field: str, token_ids: Sequence[int], limits: Limits) -> list[int]:
    """The ids as a list of int. Raises UserError if there are none, or one that is no id of the vocabulary."""
    legal = f"integers from 0 to {limits.vocab_size - 1}"
    try:
        if isinstance(token_ids, (str, bytes, bytearray)):
            raise TypeError
        ids = [operator.index(token) for token in token_ids]
    except TypeError:
        raise UserError(field, token_ids, "is not a list of token ids", legal) from None
    if not ids:
        raise UserError(field, token_ids, "is empty", "at least one token")
    outside = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
    if outside is not None:
        raise UserError(field, outside, "is out of the vocabulary", legal)
    return ids


def read_prompt(
    field: str,
    prompt: Prompt,
    params: SamplingParams,
    tokenizer: TextTokenizer | NoTokenizer,
    limits: Limits,
    first: bool = True,
) -> list[int]:
    """A prompt's token ids; `first` of its conversation, or a later one's, before which no BOS is put.

    Raises:
        UserError: empty, too long to leave room for a token, not of the vocabulary, or text without a tokenizer.
    """
    ids = tokenizer.tokenize(prompt) if isinstance(prompt, str) else prompt
    if isinstance(prompt, str) and not ids:
        raise UserError(field, prompt, "is empty", "at least one token")
    ids = check_token_ids(field, ids, limits)
    if first and params.add_BOS and tokenizer.bos is not None and ids[0] != tokenizer.bos:
        ids = check_token_ids("bos_token_id", [tokenizer.bos, *ids], limits)
    if len(ids) >= limits.max_sequence_length:
        legal = f"at most {limits.max_sequence_length - 1}, of max_sequence_length={limits.max_sequence_length}"
        raise UserError(field, f"{len(ids)} tokens", "is longer than the maximum", legal)
    return ids


def read_params(params: SamplingParams, prompt_length: int, limits: Limits, own_engine: bool) -> SamplingParams:
    """A checked copy: the token count is set, and what Megatron's class has no field for, see `_read_more`.

    Megatron's engine wants greedy as top_k 1; ours as temperature 0.

    Stop words and prompt log-probabilities are off in it: `stopping` and `LLM.logits` see to them.

    Raises:
        UserError: a field out of its range, or fields that exclude each other.
    """
    params = copy.deepcopy(params)
    for name in vars(params):
        if name not in _PARAMETERS:
            raise UserError("sampling_params", name, "is no parameter that is known", ", ".join(_PARAMETERS))
    temperature = _number("temperature", params.temperature, 0, _HOTTEST, f"0 (greedy) to {_HOTTEST:g}")
    top_k = _integer("top_k", params.top_k, 0, limits.vocab_size - 1, f"0 (off) to {limits.vocab_size - 1}")
    top_p = _number("top_p", params.top_p, 0, 1, "0 (off) to 1")
    if top_k and top_p:
        raise UserError("top_p", top_p, f"cannot go with top_k={top_k}", "one of the two")
    _read_more(params, own_engine)
    if params.top_n_logprobs:
        raise UserError("top_n_logprobs", params.top_n_logprobs, "is not returned", "0; LLM.logits has all of them")
    if params.termination_id is not None:
        legal = f"-1 (none) to {limits.vocab_size - 1}"
        params.termination_id = _integer("termination_id", params.termination_id, -1, limits.vocab_size - 1, legal)
    greedy = (0.0, 0, 0.0) if own_engine else (1.0, 1, 0.0)
    params.temperature, params.top_k, params.top_p = (temperature, top_k, top_p) if temperature else greedy
    params.num_tokens_to_generate = _tokens_to_generate(params, prompt_length, limits)
    params.num_tokens_total, params.stop_words, params.skip_prompt_log_probs = None, None, True
    return params


def _read_more(params: SamplingParams, own_engine: bool) -> None:
    """min_p, repetition_penalty and seed, which `SamplingParams.add_attributes` gives; set to what means none."""
    min_p = _number("min_p", getattr(params, "min_p", 0.0), 0, 1, "0 (off) to 1")
    penalty = getattr(params, "repetition_penalty", 1.0)
    penalty = _number("repetition_penalty", penalty, 1e-3, 1e3, "0.001 to 1000; 1 is off")
    seed = getattr(params, "seed", None)
    seed = None if seed is None else check_seed(seed)
    for field, value, none in (("min_p", min_p, 0.0), ("repetition_penalty", penalty, 1.0), ("seed", seed, None)):
        if value != none and not own_engine:
            raise UserError(
                field, value, "is not served by Megatron's engine", f"{none}, or a model of SSM layers alone"
            )
        setattr(params, field, value)


def read_stop_words(params: SamplingParams, tokenizer: TextTokenizer | NoTokenizer) -> tuple[list[str], frozenset[int]]:
    """The stop words that are text, and the ids of those that are a special token (which text does not show).

    Raises:
        UserError: one that is no text, is empty, mixes text and special tokens, or needs a tokenizer that is not there.
    """
    words = [] if params.stop_words is None else params.stop_words
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise UserError("stop_words", words, "is not a list", "a list of texts")
    texts, special_ids = [], set()
    for word in words:
        ids = tokenizer.tokenize(word) if isinstance(word, str) else []
        if not ids:
            raise UserError("stop_words", word, "is not a text of at least one token", "texts")
        special = tokenizer.special_ids.intersection(ids)
        if special and len(ids) > 1:
            raise UserError("stop_words", word, "mixes text and special tokens", "text, or one special token")
        if special:
            special_ids |= special
        else:
            texts.append(word)
    return texts, frozenset(special_ids)


def _number(field: str, value: object, low: float, high: float, legal: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not (low <= value <= high and value < float("inf")):
        raise UserError(field, value, "is out of range", legal)
    return float(value)


def _integer(field: str, value: object, low: int, high: int, legal: str) -> int:
    try:
        number = operator.index(value)  # numpy's integers are integers too
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise UserError(field, value, "is out of range", legal)
    return number


def check_seed(seed: object) -> int:
    """Raises UserError unless `seed` is one that torch.Generator takes."""
    return _integer("seed", seed, 0, 2**63 - 1, "an integer from 0 to 2^63 - 1")


def _tokens_to_generate(params: SamplingParams, prompt_length: int, limits: Limits) -> int:
    most = limits.max_sequence_length
    if params.num_tokens_total is not None:
        if params.num_tokens_to_generate is not None:
            raise UserError("num_tokens_total", params.num_tokens_total, "cannot go with num_tokens_to_generate", "one")
        legal = f"{prompt_length + 1} to {most}: the prompt has {prompt_length} tokens, max_sequence_length is {most}"
        total = _integer("num_tokens_total", params.num_tokens_total, prompt_length + 1, most, legal)
        return total - prompt_length
    if params.num_tokens_to_generate is None:
        return most - prompt_length
    room = most - prompt_length
    legal = f"1 to {room}: the prompt has {prompt_length} tokens, max_sequence_length is {most}"
    return _integer("num_tokens_to_generate", params.num_tokens_to_generate, 1, room, legal)
