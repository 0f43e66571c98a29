"""Greedy text under Megatron's dynamic engine equals Hugging Face's, however prompts are batched, chunked or cut."""

import json
import shutil
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TP = pytest.mark.parametrize("tp", [1, 2, 4], ids=lambda tp: f"TP{tp}")
FAMILY = pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
CHECKPOINTS = Path(__file__).parent.parent / "examples" / "checkpoints"
LENGTHS = (1, 2, 7, 33, 64, 65, 130, 200)


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 101, (length,), generator=generator).tolist() for length in lengths]


@TP
@FAMILY
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_eight_prompts_in_four_slots_with_chunked_prefill(world, tiny, family, tied, tp):
    model, prompts = tiny(family, tied=tied), prompts_of(LENGTHS)
    expected = [model.greedy(prompt, 12) for prompt in prompts]
    limits = {"max_requests": 4, "max_tokens": 64, "max_sequence_length": 256}
    for answers in world(tp).run(jobs.greedy, model.path, prompts, 12, **limits):
        assert answers == expected


@FAMILY
def test_megatrons_engine_writes_the_same(world, tiny, family):
    model, prompts = tiny(family), prompts_of(LENGTHS)
    expected = [model.greedy(prompt, 12) for prompt in prompts]
    limits = {"max_requests": 4, "max_tokens": 64, "max_sequence_length": 256, "engine": "megatron"}
    for answers in world(2).run(jobs.greedy, model.path, prompts, 12, **limits):
        assert answers == expected


@TP
@pytest.mark.parametrize("name", ["mamba-kjv-2.7m", "falcon-mamba-kjv-2.7m", "zamba2-kjv-2.9m"])
def test_trained_checkpoints_write_what_hugging_face_writes(world, name, tp):
    path = CHECKPOINTS / name
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    hf.generation_config.eos_token_id = None
    texts = ["And God said", "Then Jesus answered and said unto them,", "1"]
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
        expected.append(out[0, ids.shape[1] :].tolist())
    params = {"temperature": 0, "num_tokens_to_generate": 200, "termination_id": -1}
    for answers in world(tp).run(jobs.generate, path, texts, params):
        assert [answer["token_ids"] for answer in answers] == expected
        assert [answer["text"] for answer in answers] == tokenizer.batch_decode(expected, skip_special_tokens=True)
        assert {len(answer["token_ids"]) for answer in answers} == {200}


@FAMILY
@pytest.mark.parametrize("tp", [1, 2], ids=lambda tp: f"TP{tp}")
def test_chunked_prefill_and_decode_give_the_states_of_the_whole(world, tiny, family, tp):
    """Prompt of 150 in chunks of 64 = in one piece; prompt of 140 and 10 decoded tokens = prompt of 150 with them."""
    model, [prompt] = tiny(family), prompts_of((150,))
    for rank in range(tp):
        whole = world(tp).run(jobs.states_after, model.path, prompt, 256, 1)[rank]
        chunked = world(tp).run(jobs.states_after, model.path, prompt, 64, 1)[rank]
        assert whole[0] == chunked[0]
        for found, expected in zip(chunked[1:], whole[1:], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        answer, *decoded = world(tp).run(jobs.states_after, model.path, prompt, 256, 11)[rank]
        _, *read = world(tp).run(jobs.states_after, model.path, prompt + answer[:10], 256, 1)[rank]
        for found, expected in zip(decoded, read, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_decode_of_a_token_equals_prefill_to_it(world, tiny):
    """Log-probabilities of greedy decoding are those of the logits over the whole text."""
    model, prompts = tiny("falcon_mamba"), prompts_of((9, 70))
    params = {"temperature": 0, "num_tokens_to_generate": 20, "termination_id": -1, "return_log_probs": True}
    answers = world(2).run(jobs.generate, model.path, prompts, params)[0]
    for prompt, answer in zip(prompts, answers, strict=True):
        text = prompt + answer["token_ids"]
        with torch.no_grad():
            log_probs = model.hf(torch.tensor([text])).logits[0].log_softmax(-1)
        expected = [log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer["token_ids"])]
        np.testing.assert_allclose(answer["logprobs"], expected, rtol=1e-4, atol=1e-4)


def test_every_rank_gets_the_same_sampled_text_and_a_seed_repeats_it(world, tiny):
    model, prompts = tiny("mamba"), prompts_of((5, 5, 5))
    params = {"temperature": 1.0, "top_k": 20, "num_tokens_to_generate": 30, "termination_id": -1}

    def tokens(seed: int) -> list[list[list[int]]]:
        ranks = world(2).run(jobs.generate, model.path, prompts, params, seed)
        return [[answer["token_ids"] for answer in rank] for rank in ranks]

    first, again, other = tokens(1), tokens(1), tokens(2)
    assert first[0] == first[1] == again[0] != other[0]


def test_a_seed_belongs_to_its_stream(world, tiny):
    """It counts from the stream's first token, whatever was asked for in between."""
    [[alone, streamed]] = world(1).run(jobs.sampled_around_streams, tiny("mamba").path, [1, 2, 3])
    assert streamed == alone


def test_no_padded_id_is_ever_sampled(world, tiny):
    """101 entries on 4 ranks are padded to 104; at a high temperature a padded row would soon be drawn."""
    model = tiny("mamba")
    params = {"temperature": 50.0, "num_tokens_to_generate": 250, "termination_id": -1}
    for answers in world(4).run(jobs.generate, model.path, prompts_of((3,) * 8), params, 0, max_sequence_length=256):
        drawn = {token for answer in answers for token in answer["token_ids"]}
        assert max(drawn) < 101 and len(drawn) > 90


def test_finish_reasons_and_times(world):
    path = CHECKPOINTS / "mamba-kjv-2.7m"
    [stopped] = world(1).run(jobs.generate, path, ["And God said"], {"temperature": 0, "num_tokens_to_generate": 1})[0]
    assert (stopped["finish_reason"], stopped["tpot"]) == ("length", None)
    ending = stopped["token_ids"][0]
    params = {"temperature": 0, "num_tokens_to_generate": 9, "termination_id": ending}
    [stopped] = world(1).run(jobs.generate, path, ["And God said"], params)[0]
    assert (stopped["finish_reason"], stopped["token_ids"]) == ("stop", [ending])
    params = {"temperature": 0, "num_tokens_to_generate": 9, "return_log_probs": True}
    [answer] = world(1).run(jobs.generate, path, ["And God said"], params)[0]
    assert answer["prompt"] == "And God said" and len(answer["logprobs"]) == len(answer["token_ids"]) == 9
    assert answer["ttft"] > 0 and answer["tpot"] > 0


def test_running_to_the_last_token_is_length_even_if_that_token_is_the_end(world):
    """With termination_id=-1 nothing ends an answer, so nothing has stopped it."""
    path = CHECKPOINTS / "mamba-kjv-2.7m"
    params = {"temperature": 0, "num_tokens_to_generate": 12, "termination_id": -1}
    [answer] = world(1).run(jobs.generate, path, ["1"], params)[0]
    assert answer["finish_reason"] == "length" and len(answer["token_ids"]) == 12


@pytest.mark.parametrize("word", [",", " a son of", "hou may", "ashamed"])
def test_stop_words_end_an_answer_and_are_never_shown(world, word):
    path = CHECKPOINTS / "mamba-kjv-2.7m"
    params = {"temperature": 0, "num_tokens_to_generate": 60}
    [whole] = world(1).run(jobs.generate, path, ["And God said"], params)[0]
    [cut] = world(1).run(jobs.generate, path, ["And God said"], params | {"stop_words": [word]})[0]
    assert word in whole["text"] and cut["text"] == whole["text"].split(word)[0] and cut["finish_reason"] == "stop"
    shown, final = world(1).run(jobs.streamed, path, "And God said", params | {"stop_words": [word]})[0]
    assert shown == final == cut["text"]


def test_a_special_token_may_be_a_stop_word(world):
    """It is not in the text, so its id ends the answer; <|endoftext|> is 0 here and comes at a high temperature."""
    path = CHECKPOINTS / "mamba-kjv-2.7m"
    params = {"temperature": 5.0, "num_tokens_to_generate": 20_000, "termination_id": -1}
    [answer] = world(1).run(jobs.generate, path, ["1"], params | {"stop_words": ["<|endoftext|>"]}, 0)[0]
    assert answer["token_ids"][-1] == 0 and 0 not in answer["token_ids"][:-1] and answer["finish_reason"] == "stop"


def test_a_stop_word_may_be_kept(world):
    path, word = CHECKPOINTS / "mamba-kjv-2.7m", "hou may"
    params = {"temperature": 0, "num_tokens_to_generate": 60}
    [whole] = world(1).run(jobs.generate, path, ["And God said"], params)[0]
    [cut] = world(1).run(
        jobs.generate, path, ["And God said"], params | {"stop_words": [word], "detokenize_stop_sequence": True}
    )[0]
    assert cut["text"] == whole["text"].split(word)[0] + word


def test_a_stream_shows_all_of_the_text_broken_characters_too(world):
    """At this temperature the bytes of tokens seldom make characters: the end must not stay in the decoder."""
    path = CHECKPOINTS / "mamba-kjv-2.7m"
    params = {"temperature": 30.0, "num_tokens_to_generate": 200, "termination_id": -1}
    shown, final = world(1).run(jobs.streamed, path, "日本", params)[0]
    assert shown == final and "\ufffd" in final


def test_event_loops_and_threads(world, tiny):
    """A model built in one loop answers in another and in threads; of two threads at once one is told to wait."""
    model = tiny("mamba")
    expected = model.greedy([1, 2, 3], 5)
    [found] = world(1).run(jobs.generate_in_a_loop_and_in_threads, model.path, [1, 2, 3])
    assert found[:3] == [expected] * 3
    assert found[3] in (
        ["NoneType", "UserError"],
        ["NoneType", "NoneType"],
    )  # the second may come when the first is done


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_any_of_several_end_tokens_ends_an_answer_and_is_kept(world, tmp_path, where):
    path = Path(shutil.copytree(CHECKPOINTS / "mamba-kjv-2.7m", tmp_path / "checkpoint"))
    params = {"temperature": 0, "num_tokens_to_generate": 30}
    [whole] = world(1).run(jobs.generate, path, ["And God said"], params)[0]
    end = whole["token_ids"][7]
    for file in ("config.json", "generation_config.json"):
        config = json.loads((path / file).read_text())
        config["eos_token_id"] = [0, end] if file == where or file == "config.json" else None
        (path / file).write_text(json.dumps(config))
    if where == "generation_config.json":
        config = json.loads((path / "config.json").read_text()) | {"eos_token_id": 0}
        (path / "config.json").write_text(json.dumps(config))
    other = Path(shutil.copytree(path, tmp_path / "edited"))  # ranks keep models by path
    [cut] = world(1).run(jobs.generate, other, ["And God said"], params)[0]
    first = whole["token_ids"].index(end)
    assert cut["token_ids"] == whole["token_ids"][: first + 1] and cut["finish_reason"] == "stop"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_close_to_float64_as_hugging_faces(world, tiny, dtype):
    model = tiny("falcon_mamba")
    [ids] = prompts_of((120,))
    reference = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(model.path, dtype=getattr(torch, dtype))
    with torch.no_grad():
        exact = reference(torch.tensor([ids])).logits[0]
        their_error = (theirs(torch.tensor([ids])).logits[0].double() - exact).norm() / exact.norm()
    for logits in world(2).run(jobs.logits, model.path, ids, dtype):
        error = (torch.from_numpy(logits).double() - exact).norm() / exact.norm()
        assert error < 1.2 * their_error
