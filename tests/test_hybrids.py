"""Zamba, Zamba2, Bamba, Falcon-H1 and Nemotron-H at every TP size; Hugging Face is the referee."""

import copy

import jobs
import megatron_jobs
import numpy as np
import pytest
import torch
from models import TinyModel, as_stored_in
from variants import EVERY, ONE_EACH, ONE_OF_EACH, VARIANTS

from megatron_ssm_tp.checkpoint.loader import open_model
from megatron_ssm_tp.partition.apply import merge

TP = pytest.mark.parametrize("tp", [1, 2, 4], ids=lambda tp: f"TP{tp}")
LIMITS = {"max_requests": 4, "max_tokens": 64, "max_sequence_length": 512}


@pytest.fixture
def model(tiny, variant) -> TinyModel:
    family, options = VARIANTS[variant]
    return tiny(family, **options)


def ids_of(length: int) -> list[int]:
    return torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def hf_logits(model: TinyModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model.hf(torch.tensor([ids])).logits[0].numpy()


def hf_gradients(hf: torch.nn.Module, dtype: torch.dtype, ids: torch.Tensor, labels: torch.Tensor) -> dict:
    hf = copy.deepcopy(hf).to(dtype)
    torch.nn.functional.cross_entropy(hf(ids).logits.flatten(0, 1), labels.flatten()).backward()
    return {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tp", [1, 2], ids=lambda tp: f"TP{tp}")
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2", *ONE_OF_EACH])
def test_no_linear_is_given_rows_with_gaps(world, tiny, family, tp):
    name, options = VARIANTS.get(family, (family, {}))
    for found in world(tp).run(jobs.linears_given_gaps, tiny(name, **options).path, ids_of(9)):
        assert found == set()


@pytest.mark.parametrize("tp", [1, 2, 4, 8], ids=lambda tp: f"TP{tp}")
@EVERY
def test_logits(world, model, tp):
    ids = ids_of(70)
    expected = hf_logits(model, ids)
    for logits in world(tp).run(jobs.logits, model.path, ids):
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("tp", "options"),
    [(1, {}), (2, {}), (4, {}), (8, {}), (4, {"sequence_parallel": True})],
    ids=["TP1", "TP2", "TP4", "TP8", "TP4-SP"],
)
@EVERY
def test_gradients(world, model, tp, options):
    """Of every parameter, those of shared blocks and adapters included, against Hugging Face's in float64.

    Within 1e-4 of each parameter's largest; or, where the model multiplies rounding, twice the worst that Hugging Face
    itself errs in float32.
    """
    ids, labels = torch.randint(0, 101, (2, 2, 24), generator=torch.Generator().manual_seed(2))
    exact, theirs = (hf_gradients(model.hf, dtype, ids, labels) for dtype in (torch.float64, torch.float32))
    sources = open_model(model.path).sources
    references = {name: as_stored_in(source, exact) for name, source in sources.items()}
    hf_errs = max(relative(as_stored_in(source, theirs), references[name]) for name, source in sources.items())
    ranks = world(tp).run(jobs.gradients, model.path, ids.tolist(), labels.tolist(), **options)
    for name, source in sources.items():
        plan, shards = source.parameter.plan(tp), [torch.from_numpy(rank[name]) for rank in ranks]
        for found in [merge(shards, source.parameter.axis, plan)] if plan else shards:
            assert relative(found, references[name]) < max(1e-4, 2 * hf_errs), name


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).abs().max() / reference.abs().max())


@TP
@EVERY
def test_greedy_tokens_in_continuous_batching(world, model, tp):
    """Six prompts in four slots, read in chunks of 64; the longest needs a second block of keys and values.

    Hugging Face computes each token anew: its one-token step of Zamba2 and Nemotron-H does not clamp dt.
    """
    prompts = [ids_of(length) for length in (1, 2, 33, 65, 130, 250)]
    expected = [model.greedy(prompt, 10, use_cache=False) for prompt in prompts]
    for answers in world(tp).run(jobs.greedy, model.path, prompts, 10, **LIMITS):
        assert answers == expected


@pytest.mark.parametrize("tp", [1, 2], ids=lambda tp: f"TP{tp}")
@pytest.mark.parametrize("variant", ["mamba2", *ONE_OF_EACH])
def test_states_do_not_depend_on_how_a_prompt_was_read(world, model, tp):
    """150 tokens in pieces of 43, 64 and 43 = in one piece; 140 and 10 decoded = 150 with them."""
    prompt = ids_of(150)
    whole = world(tp).run(jobs.states_after, model.path, prompt, 256, 1)
    chunked = world(tp).run(jobs.states_after, model.path, prompt, 64, 1, ids_of(21))
    answer = world(tp).run(jobs.states_after, model.path, prompt[:140], 256, 11)
    grown = world(tp).run(jobs.states_after, model.path, prompt[:140] + answer[0][0][:10], 256, 1)
    for one, other in [*zip(whole, chunked, strict=True), *zip(answer, grown, strict=True)]:
        for a, b in zip(one[1:], other[1:], strict=True):
            assert np.abs(a - b).max() < 1e-4 * np.abs(a).max()


@TP
@ONE_EACH
def test_static_engine(world, model, tp):
    prompts = [list(range(1, 8)), list(range(3, 15)), [5, 9]]
    expected = [model.greedy(prompt, 10, use_cache=False) for prompt in prompts]
    for answers in world(tp).run(megatron_jobs.static_greedy, model.path, prompts, 10):
        assert answers == expected


@ONE_EACH
def test_torch_dist_saved_at_2_loads_at_1_and_8_and_back(world, model, tmp_path):
    """At 8 ranks groups, heads of keys and mamba heads are shared: each must be stored once, and found by all."""
    ids = ids_of(40)
    expected = hf_logits(model, ids)
    for saved, loaded in ((2, (1, 8)), (8, (2,))):
        folder = tmp_path / f"saved-at-{saved}"
        world(saved).run(megatron_jobs.save_torch_dist, model.path, folder)
        for tp in loaded:
            for logits in world(tp).run(megatron_jobs.logits_from_torch_dist, model.path, folder, ids):
                assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max(), f"{saved} -> {tp}"


@pytest.mark.parametrize("tp", [1, 4], ids=lambda tp: f"TP{tp}")
@pytest.mark.parametrize("variant", ["zamba2", "falcon_h1-norm"])
def test_bfloat16_errs_no_more_than_hugging_face(world, model, tp):
    """Against float64; a norm finished after the reduction, low-rank adapters and multipliers included."""
    ids = ids_of(100)
    exact, theirs = copy.deepcopy(model.hf).double(), type(model.hf).from_pretrained(model.path, dtype=torch.bfloat16)
    with torch.no_grad():
        exact, theirs = (hf(torch.tensor([ids])).logits[0].double().numpy() for hf in (exact, theirs))
    [ours, *_] = world(tp).run(jobs.logits, model.path, ids, "bfloat16")
    assert np.linalg.norm(ours - exact) < 1.2 * np.linalg.norm(theirs - exact)


def test_requests_that_outgrow_the_cache_wait_and_are_read_again(world, tiny):
    """Room for 512 tokens of keys and values, and a block a request: four answers of 260 tokens do not fit at once."""
    model, prompts = tiny("nemotron_h", tied=False), [ids_of(length) for length in (240, 250, 200, 230)]
    limits = LIMITS | {"max_sequence_length": 512, "max_cached_tokens": 512}
    expected = world(2).run(jobs.greedy, model.path, prompts, 260, **LIMITS, max_cached_tokens=4096)
    assert world(2).run(jobs.greedy, model.path, prompts, 260, **limits) == expected
