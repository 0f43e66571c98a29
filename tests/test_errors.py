"""What a caller can get wrong: one line with field, value and what is legal, the same on every rank."""

import re
from pathlib import Path

import error_jobs
import jobs
import megatron_jobs
import pytest

MAMBA = Path(__file__).parent.parent / "examples" / "checkpoints" / "mamba-kjv-2.7m"
PROMPT = [1, 2, 3]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([PROMPT, []], {}, "prompts[1]=[]: is empty; legal: at least one token"),
        ([PROMPT, [7, 101]], {}, "prompts[1]=101: is out of the vocabulary; legal: integers from 0 to 100"),
        ([[-1]], {}, "prompts[0]=-1: is out of the vocabulary; legal: integers from 0 to 100"),
        ([[1.5]], {}, "prompts[0]=[1.5]: is not a list of token ids; legal: integers from 0 to 100"),
        ([None], {}, "prompts[0]=None: is not a list of token ids; legal: integers from 0 to 100"),
        ([[1] * 64], {}, "prompts[0]='64 tokens': is longer than the maximum; legal: at most 63, of max_seq"),
        (["text"], {}, "has no tokenizer.json, so text cannot be read; legal: a tokenizer.json there"),
        ("text", {}, "prompts='text': is not a list; legal: a list of texts or of lists of token ids"),
        ("text " * 99, {}, "... (497 characters): is not a list"),
        (None, {}, "prompts=None: is not a list"),
        (["\ud800"], {}, "has no tokenizer.json"),
        ([b"And"], {}, "prompts[0]=b'And': is not a list of token ids"),
        (PROMPT, {}, "prompts[0]=1: is not a list of token ids"),
        ([PROMPT], {"num_tokens_to_generate": 62}, "num_tokens_to_generate=62: is out of range; legal: 1 to 61: the"),
        ([PROMPT], {"num_tokens_to_generate": 0}, "num_tokens_to_generate=0: is out of range; legal: 1 to 61: the"),
        ([PROMPT], {"num_tokens_to_generate": True}, "num_tokens_to_generate=True: is out of range"),
        (
            [PROMPT],
            {"num_tokens_total": 3},
            "num_tokens_total=3: is out of range; legal: 4 to 64: the prompt",
        ),
        ([PROMPT], {"top_n_logprobs": 3}, "top_n_logprobs=3: is not returned; legal: 0"),
        ([PROMPT], {"termination_id": "x"}, "termination_id='x': is out of range; legal: -1 (none) to 100"),
        ([PROMPT], {"stop_words": "end"}, "stop_words='end': is not a list; legal: a list of texts"),
        ([PROMPT], {"stop_words": [5]}, "stop_words=5: is not a text of at least one token"),
        ([PROMPT], [None], "sampling_params=None: is not one; legal: SamplingParams, or one for each prompt"),
        (
            [PROMPT],
            {"num_tokens_total": 9, "num_tokens_to_generate": 2},
            "num_tokens_total=9: cannot go with num_tokens_to_generate",
        ),
        ([PROMPT], {"temperature": -1}, "temperature=-1: is out of range; legal: 0 (greedy) to 1e+38"),
        ([PROMPT], {"temperature": 1e39}, "temperature=1e+39: is out of range; legal: 0 (greedy) to 1e+38"),
        ([PROMPT], {"temperature": float("nan")}, "temperature=nan: is out of range"),
        ([PROMPT], {"top_k": 101}, "top_k=101: is out of range; legal: 0 (off) to 100"),
        ([PROMPT], {"top_p": 1.5}, "top_p=1.5: is out of range; legal: 0 (off) to 1"),
        ([PROMPT], {"top_k": 2, "top_p": 0.5}, "top_p=0.5: cannot go with top_k=2; legal: one of the two"),
        ([PROMPT], {"stop_words": [","]}, "has no tokenizer.json, so text cannot be read"),
        ([PROMPT, PROMPT], [{}], "sampling_params=1: are not as many as prompts; legal: one, or 2"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_prompts_and_parameters(world, tiny, prompts, params, message):
    answers = world(2).run(error_jobs.error_of, tiny("mamba").path, prompts, params, max_sequence_length=64, timeout=30)
    assert answers[0] == answers[1]
    assert message in answers[0] and "\n" not in answers[0]


def test_an_error_leaves_the_engine_usable(world, tiny):
    model = tiny("mamba")
    world(2).run(error_jobs.error_of, model.path, [PROMPT, []], max_sequence_length=64)
    answers = world(2).run(jobs.greedy, model.path, [PROMPT], 5, max_sequence_length=64)
    assert answers == [[model.greedy(PROMPT, 5)]] * 2


def test_a_request_refused_late_leaves_nothing_behind(world, tiny):
    """The second prompt's stop word cannot be read: the first must not stay queued."""
    model, stops = tiny("mamba"), [{"temperature": 0}, {"temperature": 0, "stop_words": [","]}]
    world(2).run(error_jobs.error_of, model.path, [PROMPT, PROMPT], stops, max_sequence_length=64)
    answers = world(2).run(jobs.greedy, model.path, [PROMPT], 5, max_sequence_length=64)
    assert answers == [[model.greedy(PROMPT, 5)]] * 2


def test_a_second_stream_waits_for_the_first(world, tiny):
    expected = "stream='another': is still open; legal: consume it, or close() it, before the next"
    model = tiny("mamba")
    for error, rest, later in world(2).run(jobs.two_streams, model.path, PROMPT):
        assert error == expected
        assert rest == later == model.greedy(PROMPT, 6)


def test_text_beyond_the_vocabulary_is_refused(world, tiny):
    """A tokenizer of 1531 entries on a model of 101: no rank may look its ids up."""
    answers = world(2).run(error_jobs.error_of_text, tiny("mamba").path, MAMBA / "tokenizer.json", "And God said")
    assert answers[0] == answers[1]
    assert answers[0].endswith("is out of the vocabulary; legal: integers from 0 to 100")


def test_numpy_and_torch_token_ids_are_read(world, tiny):
    model = tiny("mamba")
    expected = [model.greedy(PROMPT, 5)] * 2
    assert world(1).run(jobs.greedy_of_arrays, model.path, PROMPT, 5) == [expected]


def test_another_failure_of_one_rank_ends_all(world):
    """What is no UserError reaches the others as RuntimeError; nobody waits."""
    assert world(2).run(error_jobs.agree_on_a_bug, timeout=30) == [
        "RuntimeError: rank 1 failed: KeyError: 'x'",
        "KeyError: 'x'",
    ]


def test_a_folder_that_rank_0_cannot_make(world, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError) as error:
        world(2).run(megatron_jobs.save_torch_dist, tiny("mamba").path, tmp_path / "file" / "saved", timeout=60)
    assert str(error.value).count("cannot be written") == 2  # on both ranks


def test_more_processes_than_gpus(monkeypatch):
    from megatron_ssm_tp import UserError
    from megatron_ssm_tp.inference.distributed import local_device

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(
        UserError, match="processes on this machine=2: are more than its GPUs; legal: at most 1"
    ) as error:
        local_device()
    assert not error.value.of_one_rank  # torchrun told every rank
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert local_device().index == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError) as error:
        local_device()
    assert error.value.of_one_rank


def test_logits_wait_for_an_open_stream_and_a_closed_model_says_so(world, tiny):
    for during, after in world(1).run(jobs.logits_beside_a_stream, tiny("mamba").path, PROMPT):
        assert "stream='another': is still open" in during
        assert after == "LLM='this one': is closed; legal: one that is not"


def test_ssm_dtype_is_a_dtype():
    from megatron_ssm_tp import CacheLimits, UserError

    with pytest.raises(UserError, match=r"ssm_dtype='float32': is no dtype of a state; legal: torch\.float32"):
        CacheLimits(ssm_dtype="float32")


def test_any_value_can_be_sent_to_the_other_ranks():
    import pickle
    import threading

    from megatron_ssm_tp import UserError

    error = UserError("path", threading.Lock(), "is not a path", "a path")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_logits_are_checked_too(world, tiny):
    path = tiny("mamba").path
    assert (
        world(2).run(error_jobs.logits_error_of, path, []) == ["token_ids=[]: is empty; legal: at least one token"] * 2
    )
    expected = "token_ids=300: is out of the vocabulary; legal: integers from 0 to 100"
    assert world(2).run(error_jobs.logits_error_of, path, [300]) == [expected] * 2


TWO = {"num_tokens_to_generate": 2}
CALL = ("generate", ([PROMPT], TWO), {})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("generate", ([[1, 2]], TWO), {}), "prompts='that of rank 1': differs from rank 0's; legal: the same on all"),
        (("generate", ([PROMPT], TWO | {"top_k": 3}), {}), "sampling_params.top_k='that of rank 1': differs"),
        (("generate", ([PROMPT], TWO), {"seed": 3}), "seed='that of rank 1': differs"),
        (("generate", ([PROMPT], TWO), {"return_states": True}), "return_states='that of rank 1': differs"),
        (("logits", (PROMPT,), {}), "call='that of rank 1': differs from rank 0's"),
        (("generate", ([[300]], TWO), {}), "prompts[0]=300: is out of the vocabulary"),
    ],
)
def test_calls_that_differ_from_rank_to_rank(world, tiny, other, message):
    """All ranks hear of it, and the next call is answered."""
    model = tiny("mamba")
    found = world(2).run(error_jobs.error_of_different_calls, model.path, [CALL, other], timeout=30)
    assert found == [(found[0][0], model.greedy([1, 2, 3], 4))] * 2 and message in found[0][0]


def test_sampling_parameters_that_nobody_knows(world, tiny):
    [message] = world(1).run(error_jobs.error_with, tiny("mamba").path, {"min_length": 3}, "auto")
    assert message.startswith("sampling_params='min_length': is no parameter that is known; legal: temperature, top_k,")


@pytest.mark.parametrize("missing_on", [0, 1])
def test_a_file_that_one_rank_cannot_see_ends_all(world, tiny, missing_on):
    answers = world(2).run(error_jobs.error_seen_by_one_rank, tiny("mamba").path, missing_on, timeout=30)
    assert answers[0] == answers[1] and "elsewhere': is not a directory" in answers[0]


@pytest.mark.parametrize(("field", "least"), [("max_requests", 1), ("max_tokens", 1), ("max_sequence_length", 2)])
def test_limits_are_positive(field, least):
    from megatron_ssm_tp import CacheLimits, UserError

    with pytest.raises(UserError, match=f"{field}={least - 1}: is out of range; legal: an integer, {least} or more"):
        CacheLimits(**{field: least - 1})


@pytest.mark.parametrize("tokens", [0, 511, 1e3, "512"])
def test_the_cache_has_room_for_one_request(tokens):
    from megatron_ssm_tp import CacheLimits, UserError

    with pytest.raises(
        UserError, match=r"max_cached_tokens=.*: is out of range; legal: an integer, max_sequence_length"
    ):
        CacheLimits(max_sequence_length=512, max_cached_tokens=tokens)


@pytest.mark.parametrize(
    "limits",
    [{"max_sequence_length": 10**9, "engine": "megatron"}, {"max_requests": 10**7}],
    ids=["phantom cache", "slots"],
)
def test_a_cache_that_does_not_fit_is_refused_before_it_is_built(world, tiny, limits):
    for message in world(2).run(error_jobs.error_of, tiny("mamba").path, [[1]], **limits):
        assert re.search(
            r"cache='[\d.]+ GiB': does not fit beside the weights, [\d.]+ GiB are free; legal: smaller", message
        )


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "a"])
def test_seeds_are_what_a_generator_takes(seed):
    from megatron_ssm_tp import UserError
    from megatron_ssm_tp.inference.requests import check_seed

    with pytest.raises(UserError, match="is out of range; legal: an integer from 0 to 2"):
        check_seed(seed)
