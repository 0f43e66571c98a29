"""What a caller can get wrong: one line with field, value and what is legal, the same on every rank."""

import jobs
import pytest

PROMPT = [1, 2, 3]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([PROMPT, []], {}, "prompts[1]=[]: is empty; legal: at least one token"),
        ([PROMPT, [7, 101]], {}, "prompts[1]=101: is out of the vocabulary; legal: 0 to 100"),
        ([[-1]], {}, "prompts[0]=-1: is out of the vocabulary; legal: 0 to 100"),
        ([[1.5]], {}, "prompts[0]=1.5: is not a token id; legal: integers from 0 to 100"),
        ([[1] * 64], {}, "prompts[0]='64 tokens': is longer than the maximum; legal: at most 63 tokens"),
        (["text"], {}, "has no tokenizer.json, so text cannot be read; legal: prompts as lists of token ids"),
        ("text", {}, "prompts='text': is one text; legal: a list of texts or of lists of token ids"),
        ([PROMPT], {"num_tokens_to_generate": 62}, "num_tokens_to_generate=62: is out of range; legal: 1 to 61 new"),
        ([PROMPT], {"num_tokens_to_generate": 0}, "num_tokens_to_generate=0: is out of range; legal: 1 to 61 new"),
        ([PROMPT], {"num_tokens_total": 3}, "num_tokens_total=3: is out of range"),
        (
            [PROMPT],
            {"num_tokens_total": 9, "num_tokens_to_generate": 2},
            "num_tokens_total=9: cannot go with num_tokens_to_generate",
        ),
        ([PROMPT], {"temperature": -1}, "temperature=-1: is out of range; legal: 0 (greedy) or a positive number"),
        ([PROMPT], {"temperature": float("nan")}, "temperature=nan: is out of range"),
        ([PROMPT], {"top_k": 101}, "top_k=101: is out of range; legal: 0 (off) to 100"),
        ([PROMPT], {"top_p": 1.5}, "top_p=1.5: is out of range; legal: 0 (off) to 1"),
        ([PROMPT], {"top_k": 2, "top_p": 0.5}, "top_p=0.5: cannot go with top_k=2; legal: one of the two"),
        ([PROMPT, PROMPT], [{}], "sampling_params=1: are not as many as prompts; legal: one, or 2"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_prompts_and_parameters(world, tiny, prompts, params, message):
    answers = world(2).run(jobs.error_of, tiny("mamba").path, prompts, params, max_sequence_length=64, timeout=30)
    assert answers[0] == answers[1]
    assert message in answers[0] and "\n" not in answers[0]


def test_an_error_leaves_the_engine_usable(world, tiny):
    model = tiny("mamba")
    world(2).run(jobs.error_of, model.path, [PROMPT, []], max_sequence_length=64)
    answers = world(2).run(jobs.greedy, model.path, [PROMPT], 5, max_sequence_length=64)
    assert answers == [[model.greedy(PROMPT, 5)]] * 2


def test_logits_are_checked_too(world, tiny):
    path = tiny("mamba").path
    assert world(2).run(jobs.logits_error_of, path, []) == ["token_ids=[]: is empty; legal: at least one token"] * 2
    expected = "token_ids=300: is out of the vocabulary; legal: 0 to 100"
    assert world(2).run(jobs.logits_error_of, path, [300]) == [expected] * 2


@pytest.mark.parametrize("missing_on", [0, 1])
def test_a_file_that_one_rank_cannot_see_ends_all(world, tiny, missing_on):
    answers = world(2).run(jobs.error_seen_by_one_rank, tiny("mamba").path, missing_on, timeout=30)
    assert answers[0] == answers[1] and "elsewhere': is not a directory" in answers[0]


@pytest.mark.parametrize("field", ["max_requests", "max_tokens", "max_sequence_length"])
def test_limits_are_positive(field):
    from megatron_ssm_tp import CacheLimits, UserError

    with pytest.raises(UserError, match=f"{field}=0: is not a positive integer; legal: 1 or more"):
        CacheLimits(**{field: 0})
