"""Sums that travel beside products: the answers are those of plain passes, and of two halves every token is in one."""

from types import SimpleNamespace

import numpy as np
import pytest
import quantized_jobs
import torch
from hypothesis import given
from hypothesis import strategies as st
from variants import VARIANTS

from megatron_ssm_tp import Bf16, Int8BlockScaling
from megatron_ssm_tp.layers.halves import NEAR, TILE, halves, middle, prompt_lengths

IDS = torch.randint(0, 101, (140,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("family", ["falcon_mamba", "mamba", "mamba2", "mamba2-G1", "mamba2-biased"])
@pytest.mark.parametrize(("tp", "recipe"), [(1, None), (2, None), (2, Int8BlockScaling(block_size=16))])
def test_answers_are_those_of_whole_passes(world, tiny, family, tp, recipe):
    """Prompts of one token to several chunks of 64, more than there are slots, so that passes mix both kinds."""
    own = {"mamba2-G1": ("mamba2", {"n_groups": 1, "tied": False}), "mamba2-biased": ("mamba2", {"use_bias": True})}
    name, options = (VARIANTS | own).get(family, (family, {}))
    prompts = [IDS, IDS[:5], IDS[3:40], IDS[7:8], IDS[20:90], IDS[:64]]
    given = tiny(name, **options).path, prompts, 5, recipe, "float32", 64
    for passes, in_halves, whole in world(tp).run(quantized_jobs.overlapped_and_whole, *given):
        assert passes >= 5
        for (tokens, logprobs), (expected, expected_logprobs) in zip(in_halves, whole, strict=True):
            if recipe is None:
                assert tokens == expected
                np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
            else:  # a code more or less may be another token, and all that follow it
                np.testing.assert_allclose(logprobs[0], expected_logprobs[0], atol=0.1)


@pytest.mark.parametrize("recipe", [None, Bf16()], ids=["none", "bf16"])
def test_z_is_the_same_behind_x_projs_sums(world, tiny, recipe):
    """Passes of prompts, of both kinds and of single tokens, which their number alone tells from prompts."""
    prompts = [IDS, IDS[:5], IDS[3:40], IDS[7:8], IDS[20:90]]
    given = tiny("falcon_mamba").path, prompts, 5, recipe, "float32", 64, "x_proj"
    for mixed, beside, plain in world(2).run(quantized_jobs.overlapped_and_whole, *given):
        assert mixed >= 5
        for (tokens, logprobs), (expected, expected_logprobs) in zip(beside, plain, strict=True):
            assert tokens == expected
            np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)


@pytest.mark.parametrize("recipe", [None, Bf16()], ids=["none", "bf16"])
def test_a_float32_stream_stays_one(world, tiny, recipe):
    """A bfloat16 model whose residual stream is float32."""
    given = tiny("falcon_mamba").path, [IDS, IDS[:5]], 3, recipe, "bfloat16", 256
    for passes, in_halves, whole in world(2).run(quantized_jobs.overlapped_and_whole, *given):
        assert passes
        for (_, logprobs), (_, expected) in zip(in_halves, whole, strict=True):
            np.testing.assert_allclose(logprobs[:1], expected[:1], atol=0.03)


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        ("mamba", [0, 0], "tp_overlap_from=0: is no number of tokens; legal: an integer from 1, or None"),
        ("mamba", [64.0, 64.0], "tp_overlap_from=64.0: is no number of tokens; legal: an integer from 1, or None"),
        ("mamba", [64, None], "tp_overlap_from='that of rank 1': differs from rank 0's; legal: the same on all ranks"),
        ("zamba2", [64, 64], "tp_overlap_from=64: the model has other layers than SSMs; legal: None"),
    ],
)
def test_what_cannot_go_in_halves_is_refused(world, tiny, family, asked, message):
    for found in world(2).run(quantized_jobs.error_of_overlap, tiny(family).path, asked):
        assert found == message


@pytest.mark.parametrize(
    ("family", "way", "message"),
    [
        ("mamba", "quarters", "tp_overlap='quarters': hides no reduction; legal: halves, x_proj"),
        ("mamba2", "x_proj", "tp_overlap='x_proj': the model has no x_proj; legal: halves"),
    ],
)
def test_ways_that_there_are_not_are_refused(world, tiny, family, way, message):
    for found in world(2).run(quantized_jobs.error_of_overlap, tiny(family).path, [64, 64], way):
        assert found == message


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=6).filter(lambda found: sum(found) > 1)


@given(lengths)
def test_the_middle_is_near_and_at_a_prompts_end_where_one_is(prompts):
    cut, whole = middle(prompts), sum(prompts)
    ends = [sum(prompts[: i + 1]) for i in range(len(prompts))]
    assert 0 < cut < whole and abs(cut - whole / 2) <= max(TILE, whole / NEAR)
    if any(abs(end - whole / 2) <= whole / NEAR for end in ends):
        assert cut in ends


@given(lengths, st.integers(0, 3), st.integers(0, 5))
def test_every_token_is_in_one_half(prompts, decodes, padding):
    """As mixers read them: decoding requests first, then prompts by cu_seqlens and slots, then padding."""
    tokens = decodes + sum(prompts)
    ends = torch.tensor([0, *prompts]).cumsum(0)
    context = SimpleNamespace(
        batch_dimensions=SimpleNamespace(decode_req_count=decodes, prefill_req_count=len(prompts), token_count=tokens),
        mamba_metadata=SimpleNamespace(
            batch_indices_decode=torch.arange(decodes + 2) if decodes else None,
            batch_indices_prefill=torch.arange(100, 100 + len(prompts) + 2),
            cu_seqlens=torch.cat([ends, ends[-1:].expand(2)]),
        ),
        paused_request_count=1,
        total_request_count=1 + decodes + len(prompts),
        request_query_lengths=torch.tensor([9, *[1] * decodes, *prompts, 7, 7]),
    )
    assert prompt_lengths(context) == prompts
    rows, seen = torch.arange(tokens + padding), []
    for part, half in halves(context, prompts):
        own, counts, metadata = rows[part], half.batch_dimensions, half.mamba_metadata
        for i in range(counts.decode_req_count):
            seen.append((metadata.batch_indices_decode[i].item(), own[i].item()))
        own = own[counts.decode_req_count : counts.token_count]
        begins = metadata.cu_seqlens[: counts.prefill_req_count + 1].tolist()
        assert begins[0] == 0 and begins[-1] == len(own) and begins == sorted(set(begins))
        assert list(half.lengths) == np.diff(begins).tolist()
        for i, slot in enumerate(metadata.batch_indices_prefill[: counts.prefill_req_count].tolist()):
            seen += [(slot, row) for row in own[begins[i] : begins[i + 1]].tolist()]
    expected = [(i, i) for i in range(decodes)]
    for i, length in enumerate(prompts):
        expected += [(100 + i, decodes + ends[i].item() + row) for row in range(length)]
    assert seen == expected


def test_lengths_that_the_host_does_not_know_are_none():
    counts = SimpleNamespace(decode_req_count=0, prefill_req_count=2, token_count=9)
    context = SimpleNamespace(batch_dimensions=counts, paused_request_count=0, total_request_count=2)
    context.request_query_lengths = torch.tensor([4, 4])
    assert prompt_lengths(context) is None
