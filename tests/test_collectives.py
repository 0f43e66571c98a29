"""What the layers send, counted on the process groups: the reductions of the table, and nothing else."""

from dataclasses import replace
from pathlib import Path

import collective_jobs
import pytest
from variants import VARIANTS

from megatron_ssm_tp.checkpoint.loader import open_model
from megatron_ssm_tp.config import Layer, ModelConfig
from megatron_ssm_tp.partition.reductions import all_reduces

README = Path(__file__).parent.parent / "README.md"

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
            assert sent == LAYERS * [("allreduce", (tokens, 1, BCDT), tp), ("allreduce", (tokens, 1, HIDDEN), tp)]


def test_a_step_that_decodes_and_prefills_pays_no_more(world, tiny):
    """Under Megatron's engine, in chunks of 64: while the second prompt is still read, the first already decodes."""
    job, path = collective_jobs.collectives_of_steps, tiny("falcon_mamba").path
    for passes in world(2).run(job, path, [[1, 2, 3], [4] * 150], 3, max_tokens=64, engine="megatron"):
        assert len(passes) == 5  # 3 + 61, then 1 + 63, 1 + 26, and two steps of the second alone
        assert [len(sent) for sent in passes] == [2 * LAYERS] * 5


def test_the_recorder_sees_every_kind(world):
    """Otherwise the test above could pass with a gather in the mixer."""
    for names in world(2).run(collective_jobs.collectives_of_megatrons_mappings):
        assert names == ["_allgather_base", "_reduce_scatter_base", "allreduce", "broadcast"]


COUNTED = {  # id: family, options; settings whose norms, heads and groups take every path of the table
    "mamba": ("mamba", {}),
    "falcon_mamba": ("falcon_mamba", {}),
    "mamba2": ("mamba2", {"n_groups": 1, "tied": False}),
    **VARIANTS,
}


def expected_of(config: ModelConfig, kinds: list[Layer], tp: int, tokens: int) -> list[tuple]:
    """What these layers may send, by the table."""
    sent = [reduction for kind in kinds for reduction in all_reduces(config, kind, tp)]
    return [("allreduce", (tokens, 1, reduction.values), reduction.ranks) for reduction in sent]


@pytest.mark.parametrize("variant", COUNTED)
@pytest.mark.parametrize("tp", [1, 2, 4, 8], ids=lambda tp: f"TP{tp}")
def test_every_layer_sends_what_the_table_says(world, tiny, variant, tp):
    """In a step that reads a prompt of 70 and one of 3, and in two that decode."""
    family, options = COUNTED[variant]
    path = tiny(family, **options).path
    config = replace(open_model(path).config, dtype="float32")
    for passes in world(tp).run(collective_jobs.collectives_of_steps, path, [[1, 2, 3], [4] * 70], 3):
        assert len(passes) == 3
        for sent in passes:
            tokens = sent[0][1][0] if sent else 0
            assert sent == expected_of(config, list(config.layers), tp, tokens)


README_TABLE = [  # layer, a family that has it, options, which layer
    ("Mamba, Falcon-Mamba", "mamba", {}, Layer.SSM),
    ("Mamba-2, norm of the full width", "mamba2", {"n_groups": 1, "tied": False}, Layer.SSM),
    ("Mamba-2, norm by 2 groups", "nemotron_h", {"tied": False}, Layer.SSM),
    ("Mamba-2, norm by 8 groups", "nemotron_h", {"n_groups": 8, "use_bias": True, "mlp_bias": True}, Layer.SSM),
    ("Zamba, 2 mamba heads", "zamba", {}, Layer.SSM),
    ("Zamba, with a shared block", "zamba", {}, Layer.SHARED),
    ("Zamba2, with a shared block", "zamba2", {}, Layer.SHARED),
    ("Falcon-H1, SSM beside attention", "falcon_h1", {"tied": False}, Layer.PARALLEL),
    ("attention (Bamba, Nemotron-H)", "nemotron_h", {"tied": False}, Layer.ATTENTION),
    ("MLP", "nemotron_h", {"tied": False}, Layer.MLP),
]


@pytest.mark.parametrize(("layer", "family", "options", "kind"), README_TABLE, ids=[row[0] for row in README_TABLE])
def test_the_table_in_the_readme(tiny, layer, family, options, kind):
    config = open_model(tiny(family, **options).path).config
    counts = " | ".join(str(len(all_reduces(config, kind, tp))) for tp in (2, 4, 8))
    row = f"| {layer} | {counts} |"
    assert row in README.read_text(), row
