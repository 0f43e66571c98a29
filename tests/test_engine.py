"""Our own engine: greedy tokens are Hugging Face's however requests come, go and are looked at."""

import engine_jobs as jobs
import error_jobs
import jobs as llm_jobs
import pytest
import torch

from megatron_ssm_tp.inference.decoder import ladder

FAMILY = pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
TP = pytest.mark.parametrize("tp", [1, 2], ids=lambda tp: f"TP{tp}")
EVERY_TOKEN = {"longest": 1, "while_reading": 1, "ahead": 0}
LOOKS = [EVERY_TOKEN, {"longest": 7, "while_reading": 2, "ahead": 0}, {"longest": 5, "while_reading": 5, "ahead": 3}]
LENGTHS, COUNTS = (1, 40, 5, 33, 90, 2, 64, 3), (9, 1, 30, 4, 12, 2, 25, 17)


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, 101, (length,), generator=generator).tolist() for length in lengths]


@TP
@FAMILY
def test_tokens_are_hugging_faces_however_often_the_host_looks(world, tiny, family, tp):
    model, prompts = tiny(family, tied=False), prompts_of(LENGTHS)
    expected = [model.greedy(prompt, count) for prompt, count in zip(prompts, COUNTS, strict=True)]
    for bursts in LOOKS:
        for found in world(tp).run(jobs.answers, model.path, prompts, list(COUNTS), bursts):
            assert found == expected, bursts


@TP
@FAMILY
def test_padded_passes_are_those_of_their_tokens(world, tiny, family, tp):
    """Passes of one prompt, of several, and of parts of long ones, padded to a few sizes."""
    model, prompts = tiny(family, tied=False), prompts_of(LENGTHS)
    expected = [model.greedy(prompt, count) for prompt, count in zip(prompts, COUNTS, strict=True)]
    for found, sizes in world(tp).run(jobs.answers_of_padded_passes, model.path, prompts, list(COUNTS)):
        assert found == expected and {(32, 1), (32, 4), (16, 1)} <= sizes


@TP
@pytest.mark.parametrize("seed", range(4))
def test_requests_come_and_go(world, tiny, seed, tp):
    model, prompts = tiny("falcon_mamba", tied=False), prompts_of(LENGTHS)
    expected = [model.greedy(prompt, count) for prompt, count in zip(prompts, COUNTS, strict=True)]
    for found in world(tp).run(jobs.arriving, model.path, prompts, list(COUNTS), LOOKS[seed % 3], seed):
        assert sorted(found) == list(range(len(prompts)))
        assert all(tokens in (expected[index], "cancelled") for index, tokens in found.items())
        assert sum(tokens == "cancelled" for tokens in found.values()) < len(prompts) / 2


def test_progress_comes_a_burst_at_a_time_and_ends_once(world, tiny):
    [found] = world(1).run(jobs.changes, tiny("mamba").path, [1, 2, 3], 12, {"longest": 4, "ahead": 2})
    assert [len(progress.token_ids) for progress in found] == [1, 5, 9, 12]
    assert [progress.finished for progress in found] == [False, False, False, True]


@pytest.mark.parametrize(
    "more", [{}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.02, "repetition_penalty": 1.3}], ids=str
)
def test_the_same_seed_gives_the_same_tokens_alone_in_company_and_in_any_bursts(world, tiny, more):
    path, prompts = tiny("mamba", tied=False).path, prompts_of((7, 40, 3, 12))
    alone = world(1).run(jobs.sampled, path, prompts[:1], LOOKS[0], None, seed=5, **more)[0]
    for bursts in LOOKS:
        for tp in (1, 2):
            for found in world(tp).run(jobs.sampled, path, prompts, bursts, None, seed=5, **more):
                assert found[0] == alone[0]
    other = world(1).run(jobs.sampled, path, prompts[:1], LOOKS[0], None, seed=6, **more)[0]
    assert other != alone


def test_requests_without_a_seed_differ_and_a_runs_seed_repeats_them(world, tiny):
    path, prompts = tiny("mamba", tied=False).path, [[1, 2, 3]] * 2
    first, again, later = (world(1).run(jobs.sampled, path, prompts, LOOKS[1], seed)[0] for seed in (3, 3, None))
    assert first == again != later and first[0] != first[1]


@TP
@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_penalized_answers_are_hugging_faces_at_once_and_in_halves(world, tiny, family, penalty, tp):
    # Tied embeddings would have these repeat one token, whatever is penalized.
    model, prompts = tiny(family, tied=False), prompts_of((40, 3, 90, 12))
    expected = [model.greedy(prompt, 24, repetition_penalty=penalty) for prompt in prompts]
    for found in world(tp).run(jobs.penalized, model.path, prompts, 24, penalty):
        assert found == (expected, expected)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_bursts_are_short_while_prompts_are_read_and_only_so_many_are_under_way(world, tiny, ahead):
    bursts = {"longest": 7, "while_reading": 2, "ahead": ahead}
    [(beside, alone, under_way)] = world(1).run(jobs.launched, tiny("mamba").path, bursts)
    assert beside == {2} and max(alone) == 7 and under_way == ahead


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("bursts", [EVERY_TOKEN, {"longest": 2, "ahead": 3}], ids=str)
def test_ranks_that_choose_different_tokens_are_found_out(world, tiny, bursts, rank):
    for message in world(2).run(jobs.disagreement, tiny("mamba").path, rank, bursts):
        assert message.startswith("the ranks have chosen different tokens") and message.endswith("then 4 tokens")


@pytest.mark.parametrize(
    "other", [[[5, 3], [7, 9]], [[7, 9], [3, 5]], [[3, 7], [5, 9]], [[4, 4], [7, 9]], [[3, 5], [7, -1]]], ids=str
)
def test_the_same_tokens_in_other_places_are_different_tokens(world, tiny, other):
    path, tokens = tiny("mamba").path, [[3, 5], [7, 9]]
    assert world(2).run(jobs.emitted_by, path, [tokens, tokens]) == ["no error"] * 2
    for message in world(2).run(jobs.emitted_by, path, [tokens, other]):
        assert message.startswith("the ranks have chosen different tokens")


def test_what_is_under_way_can_be_left_and_cancelled(world, tiny):
    path, bursts = tiny("mamba").path, {"longest": 8, "ahead": 3}
    assert world(1).run(jobs.abandoned, path, bursts) == [([0, 1, 2], 1, 0)]
    assert world(1).run(jobs.abandoned, path, EVERY_TOKEN) == [([0, 1, 2], 0, 0)]
    assert world(1).run(jobs.cancelled_late, path, bursts) == [(True, False, [])]


@pytest.mark.parametrize(
    ("asked", "expected"), [("nothing", ["bf16"]), ("int8", ["int8"]), ("off", []), ("model", ["int8"]), ("none", [])]
)
def test_decodings_own_sums_give_way_to_what_is_asked_for(world, tiny, asked, expected):
    for found in world(2).run(jobs.recipes_of_decoding, tiny("mamba").path, asked):
        assert found == expected


def test_sizes_of_graphs():
    assert ladder(1) == [1] and ladder(6) == [1, 2, 4, 6] and ladder(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    for most in (17, 64, 300, 1000):
        sizes = ladder(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most


@pytest.mark.parametrize(
    ("params", "engine", "message"),
    [
        ({"min_p": 1.5}, "slots", "min_p=1.5: is out of range; legal: 0 (off) to 1"),
        ({"repetition_penalty": 0}, "slots", "repetition_penalty=0: is out of range"),
        ({"seed": -1}, "slots", "seed=-1: is out of range"),
        ({"min_p": 0.5}, "megatron", "min_p=0.5: is not served by Megatron's engine; legal: 0.0"),
        ({"seed": 3}, "megatron", "seed=3: is not served by Megatron's engine; legal: None"),
        ({}, "vllm", "engine='vllm': is no engine; legal: auto, slots, megatron"),
    ],
    ids=str,
)
def test_errors(world, tiny, params, engine, message):
    for found in world(2).run(error_jobs.error_with, tiny("mamba").path, params, engine):
        assert found.startswith(message)


def test_a_hybrid_stays_with_megatrons_engine(world, tiny):
    path = tiny("zamba2").path
    [message] = world(1).run(error_jobs.error_with, path, {}, "slots")
    assert message == "engine='slots': the model has other layers than SSMs; legal: auto, megatron"
    assert world(1).run(llm_jobs.engine_of, path) == ["MegatronEngine"]
    assert world(1).run(llm_jobs.engine_of, tiny("mamba").path) == ["SlotEngine"]


def test_bursts_are_checked():
    assert [message.split(":")[0] for message in jobs.legal_bursts()] == ["longest=0", "while_reading=1.5", "ahead=-1"]
