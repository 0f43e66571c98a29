"""What soak_allreduce.py found: its calls, compared between ranks, and the table at its end."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from measure import markdown
from soak_calls import Call

_SHOWN = 10  # failures that are printed


class Record(NamedTuple):
    """A call. `found` is this rank's, int64 [3]: whether it ran, a checksum, the bits of its error over its bound."""

    call: Call
    mode: str
    number: int
    found: torch.Tensor


@dataclass
class Report:
    """Calls, the worst error over its bound, and refusals by kind; what failed."""

    calls: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    worst: dict = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, record: Record, ranks: tuple[int, ...], found: list[tuple[int, int, float]]) -> None:
        """`found` of the ranks of the call's group."""
        kind = (record.mode, *record.call.kind)
        if not any(ran for ran, _, _ in found):
            self.refused[kind] += 1
            return
        self.calls[kind] += 1
        off = max(ratio for _, _, ratio in found)
        self.worst[kind] = max(self.worst.get(kind, 0.0), off)
        problem = "" if off <= 1 else f"is {off:.3g} times its bound off"
        if len({(ran, bits) for ran, bits, _ in found}) > 1:
            problem = f"differs between ranks {ranks}"
        if problem:
            self.failures.append(f"call {record.number}, {record.mode}: {problem}: {record.call}")

    @property
    def passed(self) -> bool:
        return not self.failures and bool(self.calls)

    def in_words(self) -> str:
        header = ["mode", "backend", "call", "recipe", "calls", "worst error / bound", "refused"]
        rows = [
            [*kind, str(self.calls[kind]), f"{self.worst.get(kind, 0):.3f}", str(self.refused[kind] or "-")]
            for kind in sorted(self.calls.keys() | self.refused.keys())
        ]
        lines = [markdown(header, rows), "", *(f"- {text}" for text in self.failures[:_SHOWN])]
        total = f"{self.calls.total()} calls, {len(self.failures)} failures"
        return "\n".join([*lines, f"{'PASS' if self.passed else 'FAIL'}: {total}"])
