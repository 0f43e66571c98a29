"""Conversations go on from what an earlier request left, as if all of it had been read anew."""

import re

import conversation_jobs as jobs
import pytest
import torch

TP = pytest.mark.parametrize("tp", [1, 2], ids=lambda tp: f"TP{tp}")
FIRST = [torch.randint(0, 101, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 3, 1, 70)]
THEN = [[5, 6, 7], [9], [], [3] * 40]


@TP
@pytest.mark.parametrize("family", ["falcon_mamba", "mamba2"])
@pytest.mark.parametrize("way", ["length", "end", "text", "disk"])
def test_an_answer_after_a_state_is_that_after_all_that_came_before(world, tiny, tmp_path, family, tp, way):
    model = tiny(family, tied=False)
    answers = [model.greedy(prompt, 12) for prompt in FIRST]
    end = answers[0][6] if way == "end" else -1
    folder = tmp_path if way == "disk" else None
    for found, after, conversations in world(tp).run(
        jobs.taken_up, model.path, FIRST, THEN, 12, end, folder, way == "text"
    ):
        assert [len(answer) for answer in found] != [12] * 4 or way in ("length", "disk")
        assert all(answer == expected[: len(answer)] for answer, expected in zip(found, answers, strict=True))
        whole = [prompt + answer for prompt, answer in zip(FIRST, found, strict=True)]
        assert conversations == whole
        assert after == [model.greedy(before + then, 8) for before, then in zip(whole, THEN, strict=True)]


@TP
@pytest.mark.parametrize("family", ["falcon_mamba", "mamba2"])
def test_what_is_read_after_a_state_is_no_prefix(world, tiny, family, tp):
    model, then = tiny(family, tied=False), [5, 6, 7]  # tied, it would repeat what it read last
    for answer, (after, alone), hits in world(tp).run(jobs.beside_prefixes, model.path, FIRST[0], then):
        assert after == model.greedy(FIRST[0] + answer + then, 8)
        assert after != alone == model.greedy([answer[-1], *then], 8) and hits == 1


def test_errors_are_one_line(world, tiny, tmp_path):
    given = tiny("falcon_mamba").path, tiny("mamba2").path, tiny("zamba2").path, tmp_path
    [found] = world(1).run(jobs.errors, *given)
    expected = [
        r"states\[0\]='ConversationState': is no state of this model; legal: None, or the state of an answer .*",
        r"states\[0\]='str': is no state of this model; legal: None, or .*",
        r"states\[0\].token_ids=\[\]: is empty; legal: at least one token",
        r"states\[0\].token_ids=5000: is out of the vocabulary; legal: integers from 0 to \d+",
        r"states=\[None\]: are not as many as prompts; legal: None, or a list of 2",
        r"prompts\[0\]=\[\]: is empty; legal: at least one token",
        r"return_states=True: Megatron's engine returns none; legal: False",
        r"states='given': cannot be handed to Megatron's engine; legal: None",
        r"directory='FOLDER/absent': rank-0-of-1.safetensors cannot be read \(.*\); legal: a folder that save_state .*",
        r"directory='FOLDER/broken': rank-0-of-1.safetensors cannot be read \(.*\); legal: a folder that save_state .*",
        r"directory='FOLDER/file/in': cannot be written \(.*\); legal: a folder that can be written to",
        r"state='str': is no state; legal: that of an answer, of return_states=True",
    ]
    for line, pattern in zip(found, expected, strict=True):
        assert re.fullmatch(pattern, line), line
