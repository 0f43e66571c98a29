"""The text that the demo checkpoints are trained on, as tokens: chapters, a held-out part, a tokenizer, windows."""

import re
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 1531  # a prime: no tensor-parallel size divides it, so every run exercises vocabulary padding
HELD_OUT_FROM = "1 Peter 1"  # the first chapter heading of the evaluation part


def chapters(text: str) -> list[tuple[str, str]]:
    """Split the file into (heading, body) pairs; verse numbers and indentation are dropped, one verse a line."""
    parts = re.split(r"^(\S.* \d+)$", text, flags=re.MULTILINE)
    bodies = (re.sub(r"^ *\d+ ", "", body, flags=re.MULTILINE).strip() for body in parts[2::2])
    return list(zip(parts[1::2], bodies, strict=True))


def split_held_out(text: str) -> tuple[list[str], list[str]]:
    """Return training and held-out chapters as plain texts, split at HELD_OUT_FROM."""
    pairs = chapters(text)
    headings = [heading for heading, _ in pairs]
    if HELD_OUT_FROM not in headings:
        raise SystemExit(f"--text: no chapter heading {HELD_OUT_FROM!r} to hold out from")
    at = headings.index(HELD_OUT_FROM)
    texts = [f"{heading}\n{body}\n" for heading, body in pairs]
    return texts[:at], texts[at:]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training part; END_OF_TEXT is id 0 and serves as bos, eos and pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of token ids, each followed by END_OF_TEXT: int64 [tokens]."""
    stream = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    return torch.tensor(stream)


def batches(stream: torch.Tensor, batch_size: int, seq_len: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Random windows of the stream, forever: int64 [batch_size, seq_len + 1]."""
    offsets = torch.arange(seq_len + 1)
    while True:
        starts = torch.randint(len(stream) - seq_len, (batch_size, 1), generator=generator)
        yield stream[starts + offsets]
