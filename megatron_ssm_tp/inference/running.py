"""A request as the host sees it while it runs, and how often the host looks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..errors import UserError
from .conversation import ConversationState
from .prefix_cache import Snapshot
from .requests import Progress, Request
from .sampling import SamplingNeeds
from .slots import END_IDS

_SEED_STRIDE = 0x9E3779B97F4A7C15  # of the seeds of requests that bring none


@dataclass(frozen=True)
class Bursts:
    """How often the host looks.

    Args:
        longest: steps of a burst; answers are seen that many tokens at a time.
        while_reading: the same, while prompts are read between bursts.
        ahead: passes and bursts that are launched before the first is looked at.
        graphs: replay CUDA graphs; a CPU has none.
    """

    longest: int = 4
    while_reading: int = 4
    ahead: int = 2
    graphs: bool = True

    def __post_init__(self) -> None:
        for name, least in (("longest", 1), ("while_reading", 1), ("ahead", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(name, value, "is out of range", f"an integer, {least} or more")

    @classmethod
    def on(cls, device: torch.device) -> "Bursts":
        """What suits a device: a CPU gains nothing from steps ahead."""
        return cls() if device.type == "cuda" else cls(longest=1, while_reading=1, ahead=0, graphs=False)


@dataclass(eq=False)
class Running:
    """A request in the engine. `read` and `launched` count what has been launched, `tokens` what has come.

    `prompt` is all that it has to read: what a conversation has left unread goes before the request's own.
    """

    index: int
    request: Request
    ordinal: int
    slot: int = -1
    read: int = 0
    keep_at: int = 0  # of its prompt: where its states are kept as a prefix's
    made_by: str = ""  # what they depend on but the prompt, see prefix_cache.py
    launched: int = 0
    over: bool = False
    after_prompt: Snapshot | None = None  # of one whose end the device may not see
    state: ConversationState | None = None  # of one that has ended, if it is asked for
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        earlier = self.request.state.token_ids if self.request.state else []
        self.conversation = [*earlier, *self.request.prompt]
        self.prompt = [*earlier[-1:], *self.request.prompt]

    @property
    def limit(self) -> int:
        return self.request.params.num_tokens_to_generate

    @property
    def stage(self) -> str:
        """Waiting (for a slot), reading (its prompt) or decoding."""
        if self.slot < 0:
            return "waiting"
        return "reading" if self.read < len(self.prompt) else "decoding"

    @property
    def needs(self) -> SamplingNeeds:
        params = self.request.params
        return SamplingNeeds(
            random=params.temperature > 0,
            ranked=params.temperature > 0 and bool(params.top_k or params.top_p),
            penalized=params.repetition_penalty != 1,
            log_probs=params.return_log_probs,
        )

    @property
    def device_sees_end(self) -> bool:
        """Whether what ends the answer is known on the device, so that its states are left alone from there on."""
        return not self.request.stop.by_text and len(self.request.stop.end_ids) <= END_IDS

    def sampling(self, seed: int) -> dict[str, float]:
        """A value for each field of RowParams; `seed` and the ordinal give the seed of a request that brings none."""
        params = self.request.params
        own = params.seed if params.seed is not None else seed + _SEED_STRIDE * (self.ordinal + 1)
        return {
            "temperature": float(params.temperature),
            "top_k": params.top_k,
            "top_p": float(params.top_p),
            "min_p": float(params.min_p),
            "repetition_penalty": float(params.repetition_penalty),
            "seed": own % (1 << 63),
        }

    def progress(self) -> Progress:
        log_probs = list(self.log_probs) if self.request.params.return_log_probs else None
        return Progress(self.index, list(self.tokens), log_probs, self.over, self.state)


def needs_of(rows: Sequence[Running]) -> SamplingNeeds:
    """What any of them asks for."""
    needs = SamplingNeeds()
    for running in rows:
        needs |= running.needs
    return needs
