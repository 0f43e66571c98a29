"""The plug points: specs, static engine, distributed checkpoints, dtypes under Float16Module, sizes of the cache."""

import re

import megatron_jobs
import numpy as np
import pytest
import torch

TP = pytest.mark.parametrize("tp", [1, 2, 4], ids=lambda tp: f"TP{tp}")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_torch_dist_saved_at_2_loads_at_1_2_and_4(world, tiny, tmp_path, family, tied):
    model, ids = tiny(family, tied=tied, use_bias=True), list(range(1, 40))
    world(2).run(megatron_jobs.save_torch_dist, model.path, tmp_path / "saved")
    assert not (tmp_path / "saved.partial").exists()
    with torch.no_grad():
        expected = model.hf(torch.tensor([ids])).logits[0].numpy()
    for tp in (1, 2, 4):
        for logits in world(tp).run(megatron_jobs.logits_from_torch_dist, model.path, tmp_path / "saved", ids):
            assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max(), f"TP{tp}"


def test_torch_dist_refuses_to_overwrite_and_to_load_another_model(world, tiny, tmp_path):
    mamba, falcon = tiny("mamba").path, tiny("falcon_mamba").path
    world(2).run(megatron_jobs.save_torch_dist, mamba, tmp_path / "saved")
    with pytest.raises(AssertionError, match=r"save='.*saved': exists; legal: a path that does not"):
        world(2).run(megatron_jobs.save_torch_dist, mamba, tmp_path / "saved")
    with pytest.raises(AssertionError, match=r"load='.*saved': is of another model"):
        world(2).run(megatron_jobs.logits_from_torch_dist, falcon, tmp_path / "saved", [1])
    with pytest.raises(AssertionError, match="is not a torch_dist checkpoint"):
        world(2).run(megatron_jobs.logits_from_torch_dist, falcon, tmp_path / "nothing", [1])


@TP
@pytest.mark.parametrize("family", ["falcon_mamba", "mamba2"])
def test_static_engine(world, tiny, family, tp):
    model = tiny(family)
    prompts = [list(range(1, 8)), list(range(3, 15)), [5, 9]]
    expected = [model.greedy(prompt, 10) for prompt in prompts]
    for answers in world(tp).run(megatron_jobs.static_greedy, model.path, prompts, 10):
        assert answers == expected


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("mamba", "MM"), ("falcon_mamba", "MM"), ("mamba2", "MM"), ("mamba2", "M*-M"), ("mamba", "M-*")],
)
def test_specs_build_and_train_alike_at_every_tp(world, name, pattern):
    """Initial values do not depend on the number of ranks, so neither do the losses."""
    [reference] = world(1).run(megatron_jobs.train_from_spec, name, 12, pattern=pattern)
    assert reference[-1] < 0.7 * reference[0]
    for tp in (2, 4):
        for losses in world(tp).run(megatron_jobs.train_from_spec, name, 12, pattern=pattern):
            np.testing.assert_allclose(losses, reference, rtol=2e-3)


def test_a_preset_refuses_what_its_attention_does_not_do(world):
    for options, message in (
        ({"window_size": (2, 0)}, "window_size=(2, 0): is not implemented by this attention"),
        ({"qk_layernorm": True}, "qk_layernorm=True: is not implemented by this attention"),
    ):
        with pytest.raises(AssertionError, match=re.escape(message)):
            world(1).run(megatron_jobs.train_from_spec, "mamba2", 1, pattern="M*", **options)


def test_attention_drops_out_in_training_alone(world):
    [one] = world(1).run(megatron_jobs.train_from_spec, "mamba2", 2, pattern="M*", attention_dropout=0.5)
    [none] = world(1).run(megatron_jobs.train_from_spec, "mamba2", 2, pattern="M*")
    assert one[0] != none[0]


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_log_d_and_ssm_state_stay_float32(world, tiny, family):
    [found] = world(1).run(megatron_jobs.dtypes_in_bfloat16, tiny(family).path)
    kept = {name for name, dtype in found.items() if dtype == "torch.float32"}
    assert {name.rsplit(".", 1)[-1] for name in kept} == {"A_log", "D", "ssm"}
    assert set(found.values()) == {"torch.float32", "torch.bfloat16"}


def test_the_phantom_attention_takes_next_to_nothing(world, tiny):
    """Two values a token of max_sequence_length for each slot and one more; slots are as many as asked for."""
    [found] = world(1).run(megatron_jobs.cache_bytes, tiny("mamba").path, max_requests=6, max_sequence_length=1024)
    assert found["slots"] == 6
    assert found["phantom"] == (6 + 1) * 1024 * 2 * 4
    assert found["states"] == 6 * 3 * 88 * (4 + 5) * 4
    for rank in world(4).run(megatron_jobs.cache_bytes, tiny("mamba").path, max_requests=6, max_sequence_length=1024):
        assert rank["slots"] == 8  # Megatron wants a multiple of the TP size
        assert rank["states"] == 8 * 3 * 88 // 4 * (4 + 5) * 4
