"""The CPU stand-ins: there inside, gone outside, and the process as it was."""

import jobs
import torch

from megatron_ssm_tp.compat.cpu import _replacements, megatron_on_cpu


def snapshot() -> list[object]:
    return [getattr(owner, name) for owner, name, _ in _replacements()]


def test_everything_is_undone_even_after_an_error():
    from megatron.core.tensor_parallel import random

    before, tracker = snapshot(), random._CUDA_RNG_STATE_TRACKER
    try:
        with megatron_on_cpu(), megatron_on_cpu():
            assert torch.cuda.current_device() == torch.device("cpu")
            assert torch.empty(2, pin_memory=True).device.type == "cpu"
            assert not torch.cuda.is_available()
            raise KeyError
    except KeyError:
        pass
    assert snapshot() == before
    assert random._CUDA_RNG_STATE_TRACKER is tracker


def test_nothing_is_touched_where_there_is_cuda(monkeypatch):
    before = snapshot()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with megatron_on_cpu():
        assert snapshot() == before


def test_between_calls_the_process_is_as_it_was(world, tiny):
    assert world(1).run(jobs.state_between_calls, tiny("mamba").path) == [[True, True, True]]


def test_events_measure_milliseconds():
    with megatron_on_cpu():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        sum(range(100_000))
        end.record()
        assert 0 < start.elapsed_time(end) < 10_000
