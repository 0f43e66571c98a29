"""Against Hugging Face in float32: logits and the gradient of every parameter, at each TP size."""

import jobs
import numpy as np
import pytest
import torch
from models import as_stored_in

from megatron_ssm_tp.checkpoint.loader import open_model
from megatron_ssm_tp.partition.apply import merge

FAMILY = pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.mark.parametrize("tp", [1, 2, 4, 8], ids=lambda tp: f"TP{tp}")
@FAMILY
@TIED
def test_logits(world, tiny, family, tied, tp):
    model = tiny(family, tied=tied)
    ids = torch.randint(0, 101, (37,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.hf(ids[None]).logits[0].numpy()
    for rank, logits in enumerate(world(tp).run(jobs.logits, model.path, ids.tolist())):
        assert logits.shape == (37, 101) and logits.dtype == np.float32
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"rank {rank}"


UNUSUAL = {"layer_norm_epsilon": 1e-2, "conv_kernel": 3, "use_conv_bias": False, "use_bias": True}


@pytest.mark.parametrize("tp", [1, 2], ids=lambda tp: f"TP{tp}")
@pytest.mark.parametrize(
    ("family", "options"),
    [("mamba", UNUSUAL), ("falcon_mamba", UNUSUAL | {"mixer_rms_eps": 1e-2})],
    ids=["mamba", "falcon_mamba"],
)
def test_logits_of_unusual_settings(world, tiny, family, options, tp):
    """Values that no default has: whoever reads a constant instead of the config differs."""
    model = tiny(family, **options)
    ids = torch.randint(0, 101, (37,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.hf(ids[None]).logits[0].numpy()
    for logits in world(tp).run(jobs.logits, model.path, ids.tolist()):
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def _hf_gradients(hf: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> tuple[dict, float]:
    hf.zero_grad()
    loss = torch.nn.functional.cross_entropy(hf(ids).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    # A clone: the next test's zero_grad must not reach into this one's result.
    return {name: parameter.grad.clone() for name, parameter in hf.named_parameters()}, loss.item()


@pytest.mark.parametrize(
    ("tp", "options"),
    [(1, {}), (2, {}), (4, {}), (2, {"sequence_parallel": True}), (4, {"sequence_parallel": True})],
    ids=["TP1", "TP2", "TP4", "TP2-SP", "TP4-SP"],
)
@FAMILY
@TIED
def test_gradients(world, tiny, family, tied, tp, options):
    model = tiny(family, tied=tied, use_bias=True)
    generator = torch.Generator().manual_seed(2)
    ids, labels = torch.randint(0, 101, (2, 2, 24), generator=generator)
    expected, loss = _hf_gradients(model.hf, ids, labels)
    ranks = world(tp).run(jobs.gradients, model.path, ids.tolist(), labels.tolist(), **options)
    sources = open_model(model.path).sources
    assert ranks[0].keys() == {*sources, "loss"}
    for rank in ranks:
        assert abs(rank["loss"] - loss) < 1e-5
    for name, source in sources.items():
        plan, axis = source.parameter.plan(tp), source.parameter.axis
        shards = [torch.from_numpy(rank[name]) for rank in ranks]
        whole = [merge(shards, axis, plan)] if plan else shards
        reference = as_stored_in(source, expected)
        for found in whole:
            error = (found - reference).abs().max() / reference.abs().max()
            assert error < 1e-4, name
