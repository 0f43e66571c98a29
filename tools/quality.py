"""What eval_quality.py and calibrate_allreduce.py share: a model on all ranks, windows of text, and the damage done.

Damage is measured on a text's next-token distributions, of the same model on the same ranks: KL(plain || recipe) in
nats a token, how often both have the same likeliest token, and perplexity.
"""

import argparse
import math
import os
from collections import Counter
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from options import check_ranks

from megatron_ssm_tp import UserError
from megatron_ssm_tp.checkpoint.loader import ModelCheckpoint, load_parameters, open_model
from megatron_ssm_tp.cli.console import Parser, quieted
from megatron_ssm_tp.comm.recipe_book import RecipeBook
from megatron_ssm_tp.compat.cpu import megatron_on_cpu
from megatron_ssm_tp.inference.distributed import join
from megatron_ssm_tp.inference.tokenizer import NoTokenizer, TextTokenizer, load_tokenizer
from megatron_ssm_tp.layers.model import SSMModel, build_model
from megatron_ssm_tp.layers.row_parallel import RecipeRowParallelLinear, set_recipes
from megatron_ssm_tp.ranks import agree, lost_peers_reported

Books = Mapping[str, RecipeBook | None]


class Score(NamedTuple):
    """Sums over tokens; scores of different texts add up (`plus`)."""

    tokens: float = 0
    reference_nll: float = 0
    nll: float = 0
    kl_sum: float = 0
    agreeing: float = 0

    def plus(self, other: "Score") -> "Score":
        return Score(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def kl(self) -> float:
        """KL(reference || other), nats a token."""
        return self.kl_sum / self.tokens

    @property
    def agreement(self) -> float:
        """Tokens at which both have the same likeliest next token, in %."""
        return 100 * self.agreeing / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def change(self) -> float:
        """By how much perplexity differs from the reference's, in %."""
        return 100 * math.expm1((self.nll - self.reference_nll) / self.tokens)

    def as_dict(self) -> dict[str, float]:
        names = ("kl", "agreement", "perplexity", "change")
        return {"tokens": self.tokens} | {name: getattr(self, name) for name in names}


def score(reference: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> Score:
    """Compare logits [.., vocab]; `targets` [..] are the tokens that did come next."""
    p, q = reference.float().log_softmax(-1), other.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(dtype=torch.float64)
    nll = [-x.gather(-1, targets[..., None]).sum(dtype=torch.float64).item() for x in (p, q)]
    agreeing = (reference.argmax(-1) == other.argmax(-1)).sum()
    return Score(targets.numel(), *nll, kl.item(), agreeing.item())


class Site(NamedTuple):
    """A row-parallel reduction: its module's name, the numbers it sums a token, how often a forward pass calls it."""

    name: str
    values: int
    calls: int


def bytes_a_token(sites: list[Site], book: RecipeBook | None, tokens: int, itemsize: int) -> float:
    """What one rank's partial sums take on the wire in a forward pass over `tokens` tokens, a token.

    A rank receives this (p - 1) times (one-shot), or 2 (p - 1) / p times (two-shot, ring).
    """
    total = 0
    for site in sites:
        values = site.values * tokens
        recipe = book.recipe_for(site.name) if book is not None else None
        plain = recipe is None or values * itemsize < recipe.min_bytes
        total += site.calls * (values * itemsize if plain else recipe.bytes_of(values))
    return total / tokens


class _CallCounter(RecipeBook):
    """Quantizes nothing, and counts who asks."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def recipe_for(self, site: str) -> None:
        self.calls[site] += 1


def sites_of(model: SSMModel, ids: torch.Tensor) -> list[Site]:
    """The reductions of a forward pass over ids [b, l]; sums of squares that ride with a Mamba-2 product left out."""
    counter = _CallCounter()
    set_recipes(model, counter)
    logits_of(model, ids)
    set_recipes(model, None)
    linears = [m for m in model.modules() if isinstance(m, RecipeRowParallelLinear)]
    return [Site(m.site, m.output_size, counter.calls[m.site]) for m in linears if counter.calls[m.site]]


@torch.no_grad()
def logits_of(model: SSMModel, ids: torch.Tensor) -> torch.Tensor:
    """ids [b, l] -> float32 [b, l, vocab], on every rank."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with megatron_on_cpu(), lost_peers_reported():
        return model(ids, positions, None, runtime_gather_output=True).float()


class Text(NamedTuple):
    """windows [n, l + 1] of token ids, `batch_size` of which run at once: the last id is only predicted."""

    windows: torch.Tensor
    batch_size: int

    def batches(self) -> tuple[torch.Tensor, ...]:
        return self.windows.split(self.batch_size)

    @property
    def tokens_a_batch(self) -> int:
        return min(self.batch_size, len(self.windows)) * (self.windows.shape[1] - 1)


def evaluate(
    model: SSMModel, books: Books, text: Text, exact: SSMModel | None = None
) -> dict[str, tuple[Score, Score | None]]:
    """How far the model that follows each book is from the plain model, and from `exact`, if there is one.

    Every rank returns rank 0's numbers, so that ranks decide alike.
    """
    references = 2 if exact is not None else 1
    totals = {name: [Score()] * references for name in books}
    for batch in text.batches():
        ids, targets = batch[:, :-1], batch[:, 1:]
        set_recipes(model, None)
        expected = [logits_of(model, ids)] + ([logits_of(exact, ids)] if exact is not None else [])
        for name, book in books.items():
            set_recipes(model, book)
            found = logits_of(model, ids)
            totals[name] = [t.plus(score(e, found, targets)) for t, e in zip(totals[name], expected, strict=True)]
    set_recipes(model, None)
    table = torch.tensor([list(s) for s in totals.values()], dtype=torch.float64, device=text.windows.device)
    with lost_peers_reported():
        dist.broadcast(table, 0)
    scores = [[Score(*fields) for fields in row] for row in table.tolist()]
    return {name: (row[0], row[1] if exact is not None else None) for name, row in zip(books, scores, strict=True)}


def cut(ids: list[int], count: int, seq_len: int, text_option: str) -> torch.Tensor:
    """`count` windows, evenly spread, none overlapping: int64 [count, seq_len + 1].

    Raises:
        UserError: there are fewer tokens.
    """
    room = (len(ids) - 1) // seq_len
    if room < 1:
        problem = f"has {len(ids)} tokens, and a window takes {seq_len + 1}"
        raise UserError(text_option, "this file", problem, "a longer text, or a smaller --seq-len")
    if count > room:
        raise UserError("--windows", count, f"the text has {room} of {seq_len} tokens", f"1 to {room}")
    starts = [index * room // count * seq_len for index in range(count)]
    return torch.tensor([ids[start : start + seq_len + 1] for start in starts])


def parser(description: str, text_option: str) -> Parser:
    """The options that both tools have."""
    made = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--load", required=True, metavar="DIR", help="checkpoint directory with a tokenizer")
    made.add_argument(text_option, dest="text", required=True, metavar="FILE", help="UTF-8 text the model has not seen")
    made.add_argument("--windows", type=int, default=16, metavar="N", help="pieces of the text that are run")
    made.add_argument("--seq-len", type=int, default=512, metavar="L", help="tokens a piece")
    made.add_argument("--batch-size", type=int, default=8, metavar="N", help="pieces that run at once")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    made.add_argument("--block-size", type=int, default=128, metavar="N", help="values that share a scale")
    made.set_defaults(text_option=text_option)
    return made


class Setting(NamedTuple):
    """What a tool works with on this rank."""

    checkpoint: ModelCheckpoint
    groups: ProcessGroupCollection
    device: torch.device
    text: Text
    conditions: str

    def model(self, dtype: str) -> SSMModel:
        """The checkpoint's model in `dtype`, this rank's share, ready to run."""
        seq_len, tp = self.text.windows.shape[1] - 1, self.groups.tp
        with megatron_on_cpu():
            model = build_model(self.checkpoint.config, self.groups, getattr(torch, dtype), self.device, seq_len)
            load_parameters(dict(model.named_parameters()), self.checkpoint, tp.rank(), tp.size())
        set_recipes(model, None)
        return model.eval()


def open_setting(args: argparse.Namespace) -> Setting:
    """Join the ranks and read checkpoint and text.

    Raises:
        UserError: an option's value, the checkpoint or the text; the same on every rank.
    """
    quieted()
    device, groups = join(None)

    def read() -> tuple[ModelCheckpoint, torch.Tensor]:
        for name in ("windows", "seq_len", "batch_size"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}", getattr(args, name), "no count", "integers from 1")
        if groups.tp.size() == 1:
            legal = "2 or more (torchrun --nproc-per-node)"
            raise UserError("number of ranks", 1, "nothing is reduced", legal)
        checkpoint = open_model(args.load)
        check_ranks(checkpoint.config, groups.tp.size())
        ids = _read_ids(args, load_tokenizer(Path(args.load), checkpoint.config))
        return checkpoint, cut(ids, args.windows, args.seq_len, args.text_option)

    checkpoint, windows = agree(read, groups.tp)
    text = Text(windows.to(device), args.batch_size)
    return Setting(checkpoint, groups, device, text, _conditions(args, groups.tp.size(), device))


def _read_ids(args: argparse.Namespace, tokenizer: TextTokenizer | NoTokenizer) -> list[int]:
    try:
        return tokenizer.tokenize(Path(args.text).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(args.text_option, args.text, f"cannot be read ({error})", "a UTF-8 text file") from None


def _conditions(args: argparse.Namespace, tp: int, device: torch.device) -> str:
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"
    text = f"{Path(args.text).name}: {args.windows} windows of {args.seq_len} tokens, {args.batch_size} at once"
    name = Path(args.load).resolve().name
    backend = dist.get_backend()
    return f"{date.today()}, {name}, {args.dtype}, TP={tp}, {on}, {backend}, torch {torch.__version__}; {text}"
