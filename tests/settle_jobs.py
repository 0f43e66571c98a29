"""What Triton's interpreter is asked about a step's bookkeeping: it is SlotTable's own."""

from unittest import mock

import torch
from interpreter import patch_interpreter

from megatron_ssm_tp.config import ModelConfig
from megatron_ssm_tp.inference import slots as slot_tables
from megatron_ssm_tp.inference.sampling import SamplingNeeds

STATE = ("counts", "next_token", "alive")


def steps(config: ModelConfig, seed: int) -> str:
    """Several steps of tables alike, one of which asks the kernel: rows of padding among requests that end, by their
    limits or by a token, and stay ended."""
    patch_interpreter()
    torch.use_deterministic_algorithms(True)
    g = torch.Generator().manual_seed(seed)

    def table() -> slot_tables.SlotTable:
        made = slot_tables.SlotTable(config, 1, 9, torch.device("cpu"), torch.float32, torch.float32)
        made.alive[:7], made.limits[:] = True, torch.arange(10) // 2 + 1
        made.end_ids[:, :2] = torch.tensor([3, 5])
        return made

    ours, theirs = table(), table()
    for step in range(4):
        slots = torch.randperm(9, generator=g)[: int(torch.randint(1, 9, (), generator=g))]
        slots = torch.cat([slots, torch.full((3,), -1)])
        logits = torch.randn(len(slots), config.vocab_size, generator=g)
        expected, _ = theirs.choose(logits, slots, SamplingNeeds())
        with mock.patch.object(slot_tables, "kernels_can_take", lambda *tensors: True):
            found, _ = ours.choose(logits, slots, SamplingNeeds())
        alike = all(torch.equal(getattr(ours, name)[:9], getattr(theirs, name)[:9]) for name in STATE)
        if not (torch.equal(found, expected) and alike):
            return f"step {step}: {found} for {expected}, {[getattr(ours, name) for name in STATE]}"
    return "" if not theirs.alive[:7].all() and theirs.counts.max() > 1 else "nothing ended, or nothing went on"
