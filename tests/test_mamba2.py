"""Mamba-2 at every TP size: groups cut, groups shared, norms that span ranks; Hugging Face is the referee."""

import json

import collective_jobs
import jobs
import megatron_jobs
import numpy as np
import pytest
import spanning_norm_jobs
import torch
from models import as_stored_in
from safetensors.torch import load_file

from megatron_ssm_tp.checkpoint.loader import open_model
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.partition.apply import merge
from megatron_ssm_tp.partition.layout import check_tp_size, legal_tp_sizes
from megatron_ssm_tp.partition.reductions import sum_columns

GROUPS = pytest.mark.parametrize("groups", [1, 2, 8], ids=lambda g: f"G{g}")
LAYERS, HIDDEN = 3, 36


def ids_of(length: int) -> list[int]:
    return torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("tp", [1, 2, 4, 8], ids=lambda tp: f"TP{tp}")
@GROUPS
def test_logits(world, tiny, groups, tp):
    model, ids = tiny("mamba2", n_groups=groups, tied=False), ids_of(70)
    with torch.no_grad():
        expected = model.hf(torch.tensor([ids])).logits[0].numpy()
    for logits in world(tp).run(jobs.logits, model.path, ids):
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("tp", "options"),
    [(1, {}), (2, {}), (4, {}), (8, {}), (4, {"sequence_parallel": True})],
    ids=["TP1", "TP2", "TP4", "TP8", "TP4-SP"],
)
@GROUPS
def test_gradients(world, tiny, groups, tp, options):
    model = tiny("mamba2", n_groups=groups, tied=True, use_bias=True)
    ids, labels = torch.randint(0, 101, (2, 2, 24), generator=torch.Generator().manual_seed(2))
    model.hf.zero_grad()
    loss = torch.nn.functional.cross_entropy(model.hf(ids).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.hf.named_parameters()}
    ranks = world(tp).run(jobs.gradients, model.path, ids.tolist(), labels.tolist(), **options)
    for name, source in open_model(model.path).sources.items():
        plan, shards = source.parameter.plan(tp), [torch.from_numpy(rank[name]) for rank in ranks]
        for found in [merge(shards, source.parameter.axis, plan)] if plan else shards:
            reference = as_stored_in(source, expected)
            assert (found - reference).abs().max() < 1e-4 * reference.abs().max(), name


@pytest.mark.parametrize("tp", [1, 2, 4], ids=lambda tp: f"TP{tp}")
@GROUPS
def test_greedy_tokens_in_continuous_batching(world, tiny, groups, tp):
    model, prompts = tiny("mamba2", n_groups=groups, tied=False), [ids_of(n) for n in (1, 2, 33, 65, 130)]
    expected = [model.greedy(prompt, 10) for prompt in prompts]
    limits = {"max_requests": 4, "max_tokens": 64, "max_sequence_length": 256}
    for answers in world(tp).run(jobs.greedy, model.path, prompts, 10, **limits):
        assert answers == expected


@GROUPS
def test_torch_dist_saved_at_2_loads_at_1_and_4(world, tiny, tmp_path, groups):
    """With one group at 2 ranks B and C are on both, and must be stored once."""
    model, ids = tiny("mamba2", n_groups=groups, tied=True, use_bias=True), ids_of(40)
    world(2).run(megatron_jobs.save_torch_dist, model.path, tmp_path / "saved")
    with torch.no_grad():
        expected = model.hf(torch.tensor([ids])).logits[0].numpy()
    for tp in (1, 4):
        for logits in world(tp).run(megatron_jobs.logits_from_torch_dist, model.path, tmp_path / "saved", ids):
            assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max(), f"TP{tp}"


@pytest.mark.parametrize("tp", [2, 4], ids=lambda tp: f"TP{tp}")
@GROUPS
def test_one_all_reduce_a_layer(world, tiny, groups, tp):
    """Hugging Face's norm spans all ranks: its sums ride along, one column in float32."""
    path = tiny("mamba2", n_groups=groups, tied=False).path
    for passes in world(tp).run(collective_jobs.collectives_of_steps, path, [[1, 2, 3], [4] * 70], 3):
        assert len(passes) == 3
        for sent in passes:
            assert sent == LAYERS * [("allreduce", (sent[0][1][0], 1, HIDDEN + 1), tp)]


@pytest.mark.parametrize("tp", [2, 4], ids=lambda tp: f"TP{tp}")
def test_a_bfloat16_norm_is_as_close_to_float64_as_one_ranks(world, tiny, tp):
    """Sums of squares in bfloat16 columns must not cost accuracy."""
    model, ids = tiny("mamba2", n_groups=1, tied=False), ids_of(100)
    with torch.no_grad():
        exact = model.hf.double()(torch.tensor([ids])).logits[0]
    model.hf.float()
    errors = []
    for size in (1, tp):
        logits = torch.from_numpy(world(size).run(jobs.logits, model.path, ids, "bfloat16")[0]).double()
        errors.append((logits - exact).norm() / exact.norm())
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3], ids=str)
@pytest.mark.parametrize("before_gate", [False, True], ids=["gate first", "norm first"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda g: f"{g} groups")
def test_the_three_cases_of_the_norm(world, groups, before_gate, magnitude):
    """Local, deferred and reduced, against the norm written out; in float32 at every magnitude."""
    for tp in (2, 4):
        for exact in (False, True):
            for error in world(tp).run(spanning_norm_jobs.gated_norm_error, groups, before_gate, magnitude, exact):
                assert error < 1e-5, (tp, exact)


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4, 1e18], ids=str)
@pytest.mark.parametrize("before_gate", [False, True], ids=["gate first", "norm first"])
@pytest.mark.parametrize("tp", [2, 4], ids=lambda tp: f"TP{tp}")
def test_a_bfloat16_norm_that_spans_ranks_at_every_magnitude(world, before_gate, magnitude, tp):
    """Deferred and exact, against float64: no worse than what rounding two products and a sum to bfloat16 costs."""
    for exact in (False, True):
        for error in world(tp).run(
            spanning_norm_jobs.gated_norm_error, 1, before_gate, magnitude, exact, torch.bfloat16
        ):
            assert error < 3 * 2**-8, exact


@pytest.mark.parametrize(("groups", "tp"), [(1, 2), (1, 4), (2, 4)])
def test_ranks_that_share_a_group_start_with_the_same_rows(world, groups, tp):
    ranks = world(tp).run(jobs.shared_rows_after_initialization, groups)
    sharers = tp // groups
    for rank, rows in enumerate(ranks):
        for own, first in zip(rows, ranks[rank // sharers * sharers], strict=True):
            assert np.array_equal(own, first) and np.abs(own).min() > 0
    assert groups == 1 or not np.array_equal(ranks[0][0], ranks[-1][0])


def test_a_norm_whose_groups_ranks_would_halve_is_refused():
    from megatron_ssm_tp.layers.gated_norm import norm_case

    with pytest.raises(UserError, match="size=2: does not go with a norm of 3 groups; legal: divisors and multiples"):
        norm_case(3, 2, torch.float32)


def test_groups_must_divide_heads(tiny, tmp_path):
    raw = json.loads((tiny("mamba2", n_groups=2, tied=False).path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"n_groups": 3}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"n_groups=3: does not divide n_heads \(8\); legal: a divisor of n_heads"):
        open_model(tmp_path)


def test_sums_in_half_precision_columns_are_float32s():
    from megatron_ssm_tp.ops.gated_norm import pack_sums

    product, columns = torch.zeros(50, 0, dtype=torch.bfloat16), sum_columns("bfloat16", 4)
    parts = torch.rand(4, 50, 1) * torch.logspace(-6, 6, 50)[:, None]
    packed = [pack_sums(product, part, rank, columns) for rank, part in enumerate(parts)]
    assert packed[0].shape[-1] == columns
    summed = packed[0] + packed[1] + packed[2] + packed[3]  # in bfloat16, as a reduction would
    torch.testing.assert_close(summed.float().sum(-1, keepdim=True), parts.sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_spec_trains_alike_where_megatrons_own_mixer_stops(world, groups):
    """2 groups on 4 ranks: Megatron asserts n_groups % tp == 0. The norm's sums are reduced among the ranks here."""
    [reference] = world(1).run(megatron_jobs.train_from_spec, "mamba2", 12, groups)
    assert reference[-1] < 0.7 * reference[0]
    for losses in world(4).run(megatron_jobs.train_from_spec, "mamba2", 12, groups):
        np.testing.assert_allclose(losses, reference, rtol=2e-3)


def test_state_spaces_original_is_the_same_model(world, tiny, tmp_path):
    model, ids = tiny("mamba2", n_groups=1, tied=True), ids_of(20)
    tensors = load_file(model.path / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    ssm = {"layer": "Mamba2", "d_state": 5, "headdim": 9}
    config = {"d_model": 36, "n_layer": 3, "vocab_size": 101, "pad_vocab_size_multiple": 1, "ssm_cfg": ssm}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = world(2).run(jobs.logits, model.path, ids)[0]
    for logits in world(2).run(jobs.logits, tmp_path, ids):
        assert np.array_equal(logits, expected)


@pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])
def test_state_spaces_norms_by_group_in_either_order(world, tiny, tmp_path, before):
    """No other implementation runs here: one rank, where the norm is plain, is the referee of those that share."""
    model, ids = tiny("mamba2", n_groups=2, tied=True), ids_of(40)
    tensors = load_file(model.path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    ssm = {"layer": "Mamba2", "d_state": 5, "headdim": 9, "ngroups": 2, "norm_before_gate": before}
    config = {"d_model": 36, "n_layer": 3, "vocab_size": 101, "pad_vocab_size_multiple": 1, "ssm_cfg": ssm}
    (tmp_path / "config.json").write_text(json.dumps(config))
    [expected] = world(1).run(jobs.logits, tmp_path, ids)
    [full_width] = world(1).run(jobs.logits, model.path, ids)
    assert np.abs(expected - full_width).max() > 1e-2 * np.abs(expected).max()
    for tp in (2, 4, 8):
        for logits in world(tp).run(jobs.logits, tmp_path, ids):
            assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max(), tp


def test_legal_sizes(tiny):
    config = open_model(tiny("mamba2", n_groups=2, tied=False).path).config
    assert legal_tp_sizes(config) == [1, 2, 4, 8]


def test_three_groups_on_two_ranks_are_refused(tmp_path):
    from models import make_tiny

    path = make_tiny(tmp_path, "mamba2", num_heads=6, head_dim=12, n_groups=3).path
    with pytest.raises(UserError, match=r"size=2: does not divide n_groups \(3\); legal: 1, 3, 6 \(to 64\)$"):
        check_tp_size(open_model(path).config, 2)


def test_codestral_config():
    """mistralai/Mamba-Codestral-7B: norm_before_gate true, which HF does not read; eight groups; untied."""
    from test_checkpoint import read_config

    raw = {"model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 32768, "n_groups": 8}
    raw |= {"num_heads": 128, "head_dim": 64, "state_size": 128, "norm_before_gate": True, "expand": 2}
    raw |= {"time_step_limit": [0.0, float("inf")], "tie_word_embeddings": False}
    config = read_config(raw)
    assert config.mixer.d_inner == 8192 and not config.mixer.norm.before_gate and config.mixer.norm.groups == 1
    assert legal_tp_sizes(config) == [1, 2, 4, 8, 16, 32, 64]
