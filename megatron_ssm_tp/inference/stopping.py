"""When an answer ends before its last token: end-of-text ids, and stop words in its text."""

from collections.abc import Sequence

from .tokenizer import NoTokenizer, TextTokenizer


class StopCondition:
    """Watches one answer grow. Stop words are found in the text, wherever they begin in a token.

    Args:
        end_ids: token ids that end the answer; they stay in it.
        stop_words: texts that end it; the text is cut before the first one found (after it, with `keep_stop_word`).
    """

    def __init__(
        self,
        end_ids: frozenset[int],
        stop_words: Sequence[str],
        keep_stop_word: bool,
        tokenizer: TextTokenizer | NoTokenizer,
    ) -> None:
        self.end_ids, self.words, self._keep = end_ids, tuple(stop_words), keep_stop_word
        self._stream, self._seen, self._text = tokenizer.stream(), 0, ""

    @property
    def by_text(self) -> bool:
        """Whether a text may end the answer, too."""
        return bool(self.words)

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the answer, now these tokens, is over. Call it with every longer list."""
        if self.words:
            self._text += "".join(self._stream.push(int(token)) for token in token_ids[self._seen :])
            self._seen = len(token_ids)
        return (bool(token_ids) and token_ids[-1] in self.end_ids) or self._cut(self._text) is not None

    def visible(self, text: str) -> str:
        """`text` without the stop word that ended it."""
        at = self._cut(text)
        return text if at is None else text[:at]

    def sure(self, text: str) -> str:
        """The part of a growing text that no stop word can take back."""
        text = self.visible(text)
        longest = max((len(word) for word in self.words), default=1)
        for width in range(min(longest - 1, len(text)), 0, -1):
            if any(word.startswith(text[-width:]) for word in self.words):
                return text[:-width]
        return text

    def _cut(self, text: str) -> int | None:
        found = [(at, word) for word in self.words if (at := text.find(word)) >= 0]
        if not found:
            return None
        at, word = min(found)
        return at + len(word) if self._keep else at
