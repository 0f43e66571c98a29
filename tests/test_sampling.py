"""Sampling in tensors: Hugging Face's processors say the distributions, and a row's draw is its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_ssm_tp.inference.sampling import RowParams, SamplingNeeds, mix, sample, uniform

CPU, DRAWS, TOKENS = torch.device("cpu"), 40000, 23
ALL = SamplingNeeds(random=True, ranked=True, penalized=True, log_probs=True)
LOGITS = torch.randn(TOKENS, generator=torch.Generator().manual_seed(3)) * 2


def params_of(rows: int, **values: float) -> RowParams:
    params = RowParams.blank(rows, CPU)
    for name, value in values.items():
        getattr(params, name)[:] = value
    return params


@given(st.integers(0, 2**64 - 1))
def test_mixing_is_splitmix64s(number):
    mask = 2**64 - 1
    x = (number + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    signed = number - 2**64 if number >= 2**63 else number
    assert int(mix(torch.tensor([signed]))) & mask == x


@pytest.mark.parametrize("vary", ["seeds", "counts"])
def test_draws_are_uniform(vary):
    numbers, fixed = torch.arange(DRAWS), torch.full((DRAWS,), 12345)
    u = uniform(numbers, fixed) if vary == "seeds" else uniform(fixed, numbers)
    assert u.min() >= 0 and u.max() < 1
    assert chi_square((u * 50).long(), torch.full((50,), 1 / 50)) < 49 + 4 * (2 * 49) ** 0.5
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.02


def chi_square(found: torch.Tensor, probs: torch.Tensor) -> float:
    """Of `found`, one of len(probs) numbers each, none of which has probability 0."""
    counts = torch.bincount(found, minlength=len(probs)).double()
    assert counts[probs == 0].sum() == 0
    expected = probs.double()[probs > 0] * len(found)
    return float(((counts[probs > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.4},
        {"temperature": 1.7, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 9, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.8},
        {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 0.7},
    ],
    ids=str,
)
def test_draws_have_hugging_faces_distribution(values):
    said = [0, 4, 4, 11]
    scores = LOGITS[None].clone()
    if "repetition_penalty" in values:
        scores = RepetitionPenaltyLogitsProcessor(values["repetition_penalty"])(torch.tensor([said]), scores)
    scores = TemperatureLogitsWarper(values["temperature"])(None, scores)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in values:
            scores = warper(values[name])(None, scores)
    probs = scores.softmax(-1)[0]
    seen = torch.zeros(DRAWS, TOKENS, dtype=torch.bool)
    seen[:, said] = True
    needs = SamplingNeeds(True, "top_k" in values or "top_p" in values, "repetition_penalty" in values)
    tokens, _ = sample(LOGITS.expand(DRAWS, -1), params_of(DRAWS, seed=9, **values), torch.arange(DRAWS), needs, seen)
    kinds = int((probs > 0).sum()) - 1
    assert chi_square(tokens, probs) <= kinds + 4 * (2 * kinds) ** 0.5


@pytest.mark.parametrize("needs", [SamplingNeeds(random=True), ALL], ids=["few needs", "all"])
def test_a_row_is_its_own(needs):
    """Alone, and beside others that ask for more."""
    logits, counts = torch.randn(6, TOKENS), torch.tensor([0, 5, 7, 1, 2, 3])
    params = params_of(6, seed=4)
    params.temperature[:] = torch.tensor([0.0, 1.0, 0.7, 1.0, 0.0, 2.0])
    if needs.ranked:
        params.top_k[:] = torch.tensor([0, 3, 0, 0, 2, 0])
        params.top_p[:] = torch.tensor([0, 0, 0.5, 0, 0, 0.9])
    seen = torch.rand(6, TOKENS) < 0.3
    together, _ = sample(logits, params, counts, needs, seen)
    for row in range(6):
        at = torch.tensor([row])
        own = SamplingNeeds(bool(params.temperature[row] > 0), bool(params.top_k[row] or params.top_p[row]))
        alone, _ = sample(logits[at], params.at(at), counts[at], own)
        assert alone == together[row]
    assert torch.equal(together[[0, 4]], logits[[0, 4]].argmax(-1))


def test_log_probs_are_of_the_logits_as_they_are():
    logits = torch.randn(5, TOKENS).bfloat16()
    params = params_of(5, temperature=0.3, top_k=4, repetition_penalty=1.5)
    tokens, log_probs = sample(logits, params, torch.arange(5), ALL, torch.ones(5, TOKENS, dtype=torch.bool))
    expected = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected)


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-7, 1e-3])
def test_the_coldest_rows_are_greedy(temperature):
    logits = torch.stack([LOGITS * 1000, LOGITS])
    params = params_of(2, temperature=temperature, min_p=0.1, top_p=0.9, top_k=3, seed=5)
    tokens, log_probs = sample(logits, params, torch.zeros(2, dtype=torch.int64), ALL, torch.zeros(2, TOKENS).bool())
    assert tokens.tolist() == [LOGITS.argmax().item()] * 2 and log_probs.isfinite().all()


@pytest.mark.parametrize("needs", [ALL, SamplingNeeds(random=True), SamplingNeeds()], ids=str)
def test_what_is_no_number_chooses_some_token_and_leaves_other_rows_alone(needs):
    logits = LOGITS.repeat(4, 1)
    logits[1, 3], logits[2] = torch.inf, torch.nan
    params, counts = params_of(4, temperature=1.0, seed=7), torch.zeros(4, dtype=torch.int64)
    tokens, _ = sample(logits, params, counts, needs, torch.zeros(4, TOKENS).bool())
    alone, _ = sample(LOGITS[None], params.at(torch.tensor([0])), counts[:1], needs, torch.zeros(1, TOKENS).bool())
    assert ((tokens >= 0) & (tokens < TOKENS)).all() and tokens[0] == tokens[3] == alone[0]


def test_a_draw_does_not_depend_on_how_sums_are_ordered():
    """The sums of a large vocabulary in another order, as a GPU may have them, choose the same tokens."""
    logits = torch.randn(1, 65024, generator=torch.Generator().manual_seed(1)).expand(500, -1)
    params = params_of(500, temperature=1.0)
    params.seed[:] = torch.arange(500)
    tokens, _ = sample(logits, params, torch.zeros(500, dtype=torch.int64), SamplingNeeds(random=True))
    probs = logits[0].double().softmax(-1)
    blocks = torch.cat([probs, probs.new_zeros(64 * 1024 - 65024)]).view(64, 1024).cumsum(-1)
    behind = blocks[:, -1].flip(0).cumsum(0).flip(0)  # from the last block on
    sums = blocks + (behind[0] - behind)[:, None]
    u = uniform(params.seed, torch.zeros(500, dtype=torch.int64))
    expected = torch.searchsorted(sums.flatten(), u.double() * sums.flatten()[65023], right=True)
    assert torch.equal(tokens, expected)
