"""One prompt's answer as it grows: from tokens to text, and to what the caller is given."""

import time
from dataclasses import dataclass

from .requests import GenerationOutput, Progress, Request
from .tokenizer import NoTokenizer, TextTokenizer


@dataclass(frozen=True)
class TextPiece:
    """A step of one prompt's answer as it comes: new tokens and their text; `output` once it is finished."""

    index: int
    token_ids: list[int]
    text: str
    output: GenerationOutput | None


class Answer:
    """One request on its way to a GenerationOutput."""

    def __init__(
        self, index: int, prompt: str | None, request: Request, tokenizer: TextTokenizer | NoTokenizer, started: float
    ) -> None:
        self._index, self._prompt, self._request, self._tokenizer = index, prompt, request, tokenizer
        self._stream, self._started, self._first = tokenizer.stream(), started, None
        self._tokens, self._text, self._shown = 0, "", 0

    def advance(self, progress: Progress) -> TextPiece:
        now = time.monotonic()
        self._first = self._first or now
        new = progress.token_ids[self._tokens :]
        self._tokens += len(new)
        self._text += "".join(self._stream.push(token) for token in new)
        output = self._output(progress, now) if progress.finished else None
        # Until the end a stop word may begin in what is there, and bytes may wait for the rest of their character.
        known = output.text if output else self._request.stop.sure(self._text)
        text, self._shown = known[self._shown :], max(self._shown, len(known))
        return TextPiece(self._index, new, text, output)

    def _output(self, progress: Progress, now: float) -> GenerationOutput:
        tokens, params, stop = progress.token_ids, self._request.params, self._request.stop
        return GenerationOutput(
            prompt=self._prompt,
            prompt_token_ids=self._request.prompt,
            token_ids=tokens,
            text=stop.visible(self._tokenizer.detokenize(tokens)),
            logprobs=progress.log_probs if params.return_log_probs else None,
            finish_reason="stop" if stop.ends(tokens) else "length",
            ttft=self._first - self._started,
            tpot=(now - self._first) / (len(tokens) - 1) if len(tokens) > 1 else None,
            state=progress.state,
        )
