"""A call's prompts, parameters and states, read into the requests that engines answer."""

from collections.abc import Sequence
from hashlib import sha256

from megatron.core.inference.sampling_params import SamplingParams

from ..errors import UserError
from .conversation import ConversationState
from .requests import Limits, Prompt, Request, check_token_ids, read_params, read_prompt, read_stop_words
from .slots import SlotTable
from .stopping import StopCondition
from .tokenizer import NoTokenizer, TextTokenizer

Params = SamplingParams | Sequence[SamplingParams] | None
States = Sequence[ConversationState | None] | None


def told(requests: Sequence[Request]) -> dict[str, str]:
    """What a call asks for, by argument, in a few letters that ranks can compare."""
    names = sorted({name for request in requests for name in vars(request.params)} - {"stop_words"})
    arguments = {
        "prompts": [request.prompt for request in requests],
        "states": [request.state and request.state.token_ids for request in requests],
        "return_states": [request.return_state for request in requests],
        **{f"sampling_params.{name}": [getattr(request.params, name, None) for request in requests] for name in names},
        "sampling_params.stop_words": [(sorted(request.stop.end_ids), request.stop.words) for request in requests],
    }
    return {argument: in_few_letters(value) for argument, value in arguments.items()}


def in_few_letters(value: object) -> str:
    """A digest of its repr."""
    return sha256(repr(value).encode()).hexdigest()


class Reader:
    """Reads calls.

    Args:
        end_ids: tokens that end an answer, where its parameters name none.
        table: of our own engine; None: Megatron's runs.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | NoTokenizer,
        limits: Limits,
        end_ids: Sequence[int],
        table: SlotTable | None,
    ) -> None:
        self.tokenizer, self.limits, self.end_ids, self.table = tokenizer, limits, end_ids, table

    def read(
        self, prompts: Sequence[Prompt], params: Params, states: States = None, return_states: bool = False
    ) -> list[Request]:
        """A request for each prompt.

        Raises:
            UserError: one that cannot be served.
        """
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
            raise UserError("prompts", prompts, "is not a list", "a list of texts or of lists of token ids")
        if return_states and self.table is None:
            raise UserError("return_states", True, "Megatron's engine returns none", "False")
        each = zip(prompts, self._params(params, len(prompts)), self._states(states, len(prompts)), strict=True)
        return [self._request(f"prompts[{i}]", *given, return_states) for i, given in enumerate(each)]

    def _request(
        self,
        field: str,
        prompt: Prompt,
        params: SamplingParams,
        state: ConversationState | None,
        return_state: bool,
    ) -> Request:
        resumed = state is not None and isinstance(prompt, Sequence) and not prompt  # an answer goes on where it ended
        ids = [] if resumed else read_prompt(field, prompt, params, self.tokenizer, self.limits, state is None)
        ends = self.end_ids if params.termination_id is None else (params.termination_id,)
        words, word_ids = read_stop_words(params, self.tokenizer)
        stop = StopCondition(frozenset(ends) | word_ids, words, params.detokenize_stop_sequence, self.tokenizer)
        read = read_params(params, len(ids), self.limits, self.table is not None)
        return Request(ids, read, stop, state=state, return_state=return_state)

    @staticmethod
    def _params(params: Params, count: int) -> list[SamplingParams]:
        given = params if params is not None else SamplingParams(temperature=0)
        each = list(given) if isinstance(given, Sequence) else [given] * count
        for one in each:
            if not isinstance(one, SamplingParams):
                raise UserError("sampling_params", one, "is not one", "SamplingParams, or one for each prompt")
        if len(each) != count:
            raise UserError("sampling_params", len(each), "are not as many as prompts", f"one, or {count}")
        return each

    def _states(self, states: States, count: int) -> list[ConversationState | None]:
        if states is None:
            return [None] * count
        if self.table is None:
            raise UserError("states", "given", "cannot be handed to Megatron's engine", "None")
        if not isinstance(states, Sequence) or len(states) != count:
            raise UserError("states", states, "are not as many as prompts", f"None, or a list of {count}")
        for index, state in enumerate(states):
            if state is not None and not (isinstance(state, ConversationState) and self.table.fits(state.snapshot)):
                legal = "None, or the state of an answer of this model's, of the same dtype and ssm_dtype"
                raise UserError(f"states[{index}]", type(state).__name__, "is no state of this model", legal)
            if state is not None:
                check_token_ids(f"states[{index}].token_ids", state.token_ids, self.limits)
        return list(states)
