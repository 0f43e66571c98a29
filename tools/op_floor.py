"""What an operator's work is, and how long its bytes or its special functions alone would take: the floor."""

from typing import NamedTuple

import torch
from measure import busy_clock
from memory_speed import copy_speed
from op_cases import Case, call, draw, ours

H100_CLOCK = 1.755  # GHz, where nvidia-smi does not say
H100_PROCESSORS = 132
SPECIAL_A_CLOCK = 16  # special functions on an SM


def bytes_of(case: Case) -> int:
    """Bytes of all tensors that a call reads or writes, each once; a state is read and written."""
    tokens, requests, item = sum(case.lengths), len(case.lengths), case.dtype.itemsize
    weights, states = case.channels * case.width, 2 * requests * case.channels * case.width
    if case.is_scan:
        return tokens * (4 * case.channels + 2 * case.width) * item + (weights + 2 * case.channels + states) * 4
    return (2 * tokens * case.channels + weights + case.channels + states) * item


def special_functions(case: Case) -> int:
    """Exponentials and their like: one a state, and softplus and gate; or an activation."""
    return sum(case.lengths) * case.channels * (case.width + 3 if case.is_scan else 2)


class Floor(NamedTuple):
    """What the floor assumes: bytes a second, special functions a second, and both in words."""

    bandwidth: float
    special: float
    words: str

    def seconds(self, case: Case) -> float:
        return max(bytes_of(case) / self.bandwidth, special_functions(case) / self.special)


def floor_of(device: torch.device, bandwidth: float | None, clock: float | None, channels: int) -> Floor:
    """The floor's assumptions, measured where they can be.

    Args:
        bandwidth: TB/s; None is a large copy's.
        clock: GHz; None is nvidia-smi's while a scan of so many `channels` runs, or H100_CLOCK.
    """
    if bandwidth is None:
        bandwidth = copy_speed(device) / 1e12
    processors, source = H100_PROCESSORS, "given"
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        if clock is None:
            case = Case("scan", (2048,), channels)
            given = draw(case, device)
            found = busy_clock(lambda: call(case, ours(case), given))
            clock, source = (found / 1e9 if found else None), "nvidia-smi, while a scan ran"
    if clock is None:
        clock, source = H100_CLOCK, "assumed"
    words = (
        f"The floor is the larger of bytes / {bandwidth:.3g} TB/s and special functions / "
        f"({processors} SMs x {SPECIAL_A_CLOCK} a clock x {clock:.3f} GHz, {source})."
    )
    return Floor(bandwidth * 1e12, processors * SPECIAL_A_CLOCK * clock * 1e9, words)
