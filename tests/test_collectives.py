"""What the layers send: two all-reduces each, of R + 2N and h values a token, and nothing else."""

import collective_jobs
import pytest

LAYERS, HIDDEN, BCDT = 3, 44, 3 + 2 * 5


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("tp", [1, 2, 4], ids=lambda tp: f"TP{tp}")
def test_two_all_reduces_a_layer(world, tiny, family, tp):
    prompts = [[1, 2, 3], [4] * 70]
    for passes in world(tp).run(collective_jobs.collectives_of_steps, tiny(family).path, prompts, 3):
        assert len(passes) == 3  # both prompts prefilled together, then two decode steps
        for sent in passes:
            if tp == 1:
                assert sent == []
                continue
            tokens = sent[0][1][0]
            assert sent == LAYERS * [("allreduce", (tokens, 1, BCDT)), ("allreduce", (tokens, 1, HIDDEN))]


def test_a_step_that_decodes_and_prefills_pays_no_more(world, tiny):
    """Chunks of 64: while the second prompt is still read, the first already decodes."""
    job, path = collective_jobs.collectives_of_steps, tiny("falcon_mamba").path
    for passes in world(2).run(job, path, [[1, 2, 3], [4] * 150], 3, max_tokens=64):
        assert len(passes) == 5  # 3 + 61, then 1 + 63, 1 + 26, and two steps of the second alone
        assert [len(sent) for sent in passes] == [2 * LAYERS] * 5


def test_the_recorder_sees_every_kind(world):
    """Otherwise the test above could pass with a gather in the mixer."""
    for names in world(2).run(collective_jobs.collectives_of_megatrons_mappings):
        assert names == ["_allgather_base", "_reduce_scatter_base", "allreduce", "broadcast"]
