"""Choosing the next token of each row by its own parameters, in tensors alone: nothing is read by the host.

A row's draw depends on its logits, its parameters, its seed and how many tokens it has, never on the rows beside it or
on a generator's state: the same seed gives the same tokens in any company, as far as the logits are the same. What
draws is one uniform number a token, a hash of seed and count, and the inverse of the distribution's sums.
"""

from dataclasses import dataclass, fields
from itertools import product

import torch

from ..ops.argmax import argmax_rows

_COLDEST = 1e-6  # below that a temperature is as good as 0, and its inverse no float32
_UNIFORM_BITS = 23  # of a float32's mantissa: a product with a sum stays below the sum


@dataclass
class RowParams:
    """Parameters of rows, one each: temperature (0 is greedy), top_k (0 is off), top_p (0 is off), min_p,
    repetition_penalty (1 is off), seed."""

    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int64
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32
    repetition_penalty: torch.Tensor  # float32
    seed: torch.Tensor  # int64

    @classmethod
    def blank(cls, rows: int, device: torch.device) -> "RowParams":
        """Greedy rows."""

        def full(value: float) -> torch.Tensor:
            return torch.full(
                (rows,), value, device=device, dtype=torch.float32 if type(value) is float else torch.int64
            )

        return cls(full(0.0), full(0), full(0.0), full(0.0), full(1.0), full(0))

    def at(self, rows: torch.Tensor) -> "RowParams":
        """Those of some rows, by index."""
        return RowParams(*[getattr(self, field.name)[rows] for field in fields(self)])


@dataclass(frozen=True)
class SamplingNeeds:
    """What any row of a batch asks for; what none does is not computed.

    Args:
        random: a temperature above 0.
        ranked: top_k or top_p, which sort the vocabulary.
        penalized: a repetition penalty.
        log_probs: log-probabilities of the tokens chosen.
    """

    random: bool = False
    ranked: bool = False
    penalized: bool = False
    log_probs: bool = False

    def rounded_up(self) -> "SamplingNeeds":
        """One of four that asks for no less: each is a graph a batch size."""
        if self.penalized or self.log_probs:
            return SamplingNeeds(True, True, True, True)
        return SamplingNeeds(random=self.random or self.ranked, ranked=self.ranked)

    @property
    def greedy(self) -> bool:
        """Whether rows' parameters do not matter."""
        return not (self.random or self.ranked or self.penalized)

    @classmethod
    def all_rounded(cls) -> set["SamplingNeeds"]:
        """All that `rounded_up` returns."""
        return {cls(*asked).rounded_up() for asked in product((False, True), repeat=4)}

    def __or__(self, other: "SamplingNeeds") -> "SamplingNeeds":
        return SamplingNeeds(*[getattr(self, f.name) or getattr(other, f.name) for f in fields(self)])


def sample(
    logits: torch.Tensor,
    params: RowParams | None,
    counts: torch.Tensor | None,
    needs: SamplingNeeds,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next token of each row.

    Repetition penalty, temperature, then top-k, top-p and min-p of what is left, as in Hugging Face's processors; a
    tie of greedy rows goes to the lowest id.

    Args:
        logits: [rows, V], any float dtype; computed in float32.
        params: of these rows; None where `needs.greedy`.
        counts: int64 [rows], tokens that each has generated before: what its draw depends on besides the seed; None
            where nothing is drawn.
        seen: bool [rows, V], tokens that are penalized; needed where `needs.penalized`.

    Returns:
        tokens int64 [rows]; and where asked for the natural logarithm of their probabilities by `logits` as they are,
        float32 [rows].
    """
    if needs.greedy and not needs.log_probs:
        return argmax_rows(logits), None
    given = logits.float()
    scores = _penalized(given, seen, params.repetition_penalty) if needs.penalized else given
    tokens = argmax_rows(scores)
    if needs.random:
        greedy = params.temperature == 0
        warmth = torch.where(greedy, 1.0, params.temperature.clamp(min=_COLDEST))[:, None]
        # In float64, where sums in another order, as GPUs have them run by run and by the rows beside, differ by less
        # than a draw can see.
        scaled = (scores - scores.amax(-1, keepdim=True)).double() / warmth
        drawn = _draw(scaled.softmax(-1), params, uniform(params.seed, counts), needs.ranked)
        tokens = torch.where(greedy, tokens, drawn)
    if not needs.log_probs:
        return tokens, None
    return tokens, given.gather(-1, tokens[:, None])[:, 0] - given.logsumexp(-1)


def _penalized(scores: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Scores of seen tokens divided by the penalty if positive, else multiplied (HF: RepetitionPenalty..)."""
    factor = torch.where(scores > 0, 1 / penalty[:, None], penalty[:, None])
    return torch.where(seen, scores * factor, scores)


def _draw(probs: torch.Tensor, params: RowParams, u: torch.Tensor, ranked: bool) -> torch.Tensor:
    """Token of each row at `u` [rows] of the sums, in the order of the ids, of what is kept of probs [rows, V]; some
    token if they are NaN."""
    kept = probs >= params.min_p[:, None] * probs.amax(-1, keepdim=True)
    if ranked:
        kept &= _ranked_high(probs, params)
    sums = torch.where(kept, probs, 0.0).cumsum(-1)
    return (sums <= u[:, None] * sums[:, -1:]).sum(-1).clamp(max=probs.shape[-1] - 1)


def _ranked_high(probs: torch.Tensor, params: RowParams) -> torch.Tensor:
    """bool [rows, V]: the top_k likeliest, and the likeliest until their sum is top_p; ties go to lower ids."""
    found, order = probs.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(probs.shape[-1], device=probs.device)
    high = (place < params.top_k[:, None]) | (params.top_k[:, None] == 0)
    before = found.cumsum(-1) - found  # 0 of the first, which always stays
    high &= (before < params.top_p[:, None]) | (params.top_p[:, None] == 0)
    return torch.zeros_like(high).scatter_(-1, order, high)


def uniform(seeds: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1) of each pair of int64: three rounds of splitmix64's finalizer."""
    mixed = mix(mix(seeds) + counts)
    return (mix(mixed) & ((1 << _UNIFORM_BITS) - 1)).float() * 2.0**-_UNIFORM_BITS


def mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64 (Steele, Lea, Flood 2014) on int64, which wraps as uint64 does."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned
