"""Text to token ids and back, by the `tokenizers` library, in the shape Megatron's text generation expects."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..config import ModelConfig
from ..errors import UserError


class TextTokenizer:
    """A tokenizer.json with the attributes that TextGenerationController reads (tokenize, detokenize, eod, bos)."""

    unique_identifiers = None

    def __init__(self, file: Path, eod: int, bos: int | None) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError("tokenizer", str(file), f"cannot be read ({error})", "a tokenizer.json") from error
        self.eod = self.eos_id = eod
        self.bos = bos
        self.vocab_size = self._tokenizer.get_vocab_size()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)

    def tokenize(self, text: str) -> list[int]:
        """Raises UserError for text that UTF-8 cannot hold (lone surrogates)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError("text", text, f"is not Unicode ({error.reason})", "text that UTF-8 can hold") from error
        return self._tokenizer.encode(text).ids

    def detokenize(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def stream(self) -> "TextStream":
        return TextStream(self._tokenizer)


class TextStream:
    """Text of one growing sequence, piece by piece; a character split over tokens comes when it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        return self._stream.step(self._tokenizer, token) or ""


class NoTokenizer:
    """Stands in where a checkpoint has no tokenizer: token ids work, text does not."""

    unique_identifiers = None
    bos = None
    special_ids: frozenset[int] = frozenset()

    def __init__(self, where: Path, vocab_size: int, eod: int) -> None:
        self._where, self.vocab_size = where, vocab_size
        self.eod = self.eos_id = eod

    def tokenize(self, text: str) -> list[int]:
        legal = "a tokenizer.json there or given as tokenizer, or prompts as lists of token ids"
        raise UserError("tokenizer", str(self._where), "has no tokenizer.json, so text cannot be read", legal)

    def detokenize(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return ""

    def stream(self) -> "NoTokenizer":
        return self

    def push(self, token: int) -> str:
        return ""


def load_tokenizer(path: Path, config: ModelConfig) -> TextTokenizer | NoTokenizer:
    """The tokenizer at `path` (a tokenizer.json or a directory that has one); NoTokenizer if there is none."""
    eod = config.eos_token_ids[0] if config.eos_token_ids else -1
    file = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise UserError("tokenizer", str(path), "does not exist", "a tokenizer.json, or a directory that has one")
    if not file.is_file():
        return NoTokenizer(path, config.vocab_size, eod)
    return TextTokenizer(file, eod, config.bos_token_id)
