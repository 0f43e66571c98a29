"""Which implementation of the operators is picked, and how prompts are cut into chunks."""

import pickle

import pytest
import torch

from megatron_ssm_tp import UserError
from megatron_ssm_tp.ops import choose

PER_OPERATOR = pytest.mark.parametrize("op", choose.TRUTHS)


def test_without_cuda_it_is_the_reference_and_says_so():
    found = choose.implementation()
    assert found.name == "reference" and found.reason == "no CUDA device"
    assert all(getattr(found, op) is truth for op, truth in (choose.TRUTHS | choose.DENSE).items())


def test_a_name_that_is_none_and_one_that_cannot_run_here():
    with pytest.raises(UserError, match="ops='cuda': is no implementation; legal: auto, triton, reference"):
        choose.implementation("cuda")
    with pytest.raises(UserError, match="ops='triton': cannot run here: no CUDA device; legal: auto, reference"):
        choose.implementation("triton")


@PER_OPERATOR
def test_with_cuda_it_is_triton_but_not_for_the_cpus_tensors(monkeypatch, op):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose.implementation("reference").name == "reference"
    found = choose.implementation()
    assert found.name == "triton" and pickle.loads(pickle.dumps(found)) is not None
    called = []
    truth, kernel = (lambda *a, who=who: called.append(who) for who in ("reference", "kernel"))
    choose._by_tensors(kernel, truth, torch.zeros(1), None)
    choose._by_tensors(kernel, truth, _OnGpu(), None, (0.0, 1.0))
    choose._by_tensors(kernel, truth, _OnGpu(), torch.zeros(1, requires_grad=True))
    with torch.no_grad():
        choose._by_tensors(kernel, truth, _OnGpu(), torch.zeros(1, requires_grad=True))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        choose._by_tensors(kernel, truth, _OnGpu(), None)  # Triton would launch on the current GPU
    assert called == ["reference", "kernel", "reference", "kernel", "reference"]
    assert getattr(found, op).args[1] is choose.TRUTHS[op] and choose.TRUTHS[op].__name__ == op
    assert getattr(found, op).args[0].__name__ == op


@pytest.mark.parametrize("op", choose.DENSE)
def test_with_cuda_training_is_tritons(monkeypatch, op):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = getattr(choose.implementation(), op)
    assert found.func is choose._by_device and found.args[1] is choose.DENSE[op]
    assert found.args[0].__name__ == op and found.args[0].__module__.endswith("_grad")
    called = []
    truth, kernel = (lambda *a, who=who: called.append(who) for who in ("reference", "kernel"))
    choose._by_device(kernel, truth, torch.zeros(1), None)
    choose._by_device(kernel, truth, _OnGpu(), torch.zeros(1, requires_grad=True))
    assert called == ["reference", "kernel"]


class _OnGpu:
    is_cuda, requires_grad, get_device = True, False, lambda self: 0


@pytest.mark.parametrize(
    ("tokens", "sequences", "warps", "expected"),
    [
        (8192, 1, 128, 512),  # 2112 warps wanted
        (8192, 1, 32, 256),  # no shorter ones of so many tokens
        (1024, 1, 32, 64),
        (16384, 8, 64, 16384),  # the batch alone fills the GPU
        (16384, 8, 32, 256),
        (9000, 6, 64, 250),  # 1500 = 6 x 250: no seventh chunk for the last few tokens
        (60, 1, 128, 64),
    ],
)
def test_as_many_chunks_as_fill_the_gpu(tokens, sequences, warps, expected):
    pytest.importorskip("triton")
    from megatron_ssm_tp.ops.selective_scan import launch_for

    assert launch_for(tokens, sequences, warps, 132).chunk == expected


@pytest.mark.parametrize(("longest", "expected"), [(None, 8960), (8192, 512), (280, 8960), (8960, 512)])
def test_a_long_prompt_among_short_ones_is_cut(longest, expected):
    """Of 32 prompts only the longest counts: the others are over long before it."""
    pytest.importorskip("triton")
    from megatron_ssm_tp.ops.selective_scan import launch_for

    assert launch_for(8960, 32, 128, 132, longest).chunk // 64 * 64 == expected
