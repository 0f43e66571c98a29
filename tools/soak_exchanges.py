"""Random calls of comm.exchange's functions, and of reductions in parts, for soak_allreduce.py."""

from dataclasses import dataclass
from random import Random

import torch
import torch.distributed as dist
from soak_calls import ratio_to_bound

from megatron_ssm_tp.comm.exchange import argmax_over_ranks, linear_all_reduce
from megatron_ssm_tp.comm.mappings import reduce_parts
from megatron_ssm_tp.comm.recipes import Bf16
from megatron_ssm_tp.ops.few_rows_launch import IN_LANES

_KINDS = ("product", "parts", "argmax")


@dataclass(frozen=True)
class Exchange:
    """A product summed over the ranks, a sum of parts, or a search for rows' largest values; of bfloat16.

    Args:
        group: which of the soak's groups.
        name: "product": x [rows, inner] times a weight [columns, inner]; "parts": `inner` parts of [rows, columns];
            "argmax": [rows, columns] of each rank.
    """

    group: int
    name: str
    recipe: Bf16
    rows: int
    columns: int
    inner: int

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.recipe.backend, self.name, self.recipe.name

    def prepare(self, ranks: tuple[int, ...], group: dist.ProcessGroup, device: torch.device) -> "PreparedExchange":
        return PreparedExchange(self, ranks, group, device)


def draw_exchange(rng: Random, groups: int, backends: tuple[str, ...], block_sizes: tuple[int, ...]) -> Exchange:
    """Of sizes as decoding has them; searches by the symmetric backend alone, if that is there."""
    name, backend = rng.choice(_KINDS), rng.choice(backends)
    if name == "argmax":
        if "symmetric" not in backends:
            name = "product"
        else:
            backend = "symmetric"
    rows, columns = rng.randint(1, IN_LANES), rng.choice((1, 33, 288, 1024, 1100))
    inner = rng.choice((64, 300, 1024, 4096))
    if name != "product":
        rows, columns = rng.choice((1, 3, 64)), rng.choice((1, 288, 4096, 20000))
        inner = rng.randint(2, 16)
    return Exchange(rng.randrange(groups), name, Bf16(rng.choice(block_sizes), backend=backend), rows, columns, inner)


class PreparedExchange:
    """Its tensors on this rank, in memory that stays, and what it must give."""

    def __init__(self, call: Exchange, ranks: tuple[int, ...], group: dist.ProcessGroup, device: torch.device) -> None:
        self.call, self.ranks, self.group, self.device = call, ranks, group, device
        self.inputs = [torch.empty_like(t) for t in self._of(0, 0)]

    def _of(self, seed: int, rank: int) -> list[torch.Tensor]:
        """What a rank brings."""
        call, generator = self.call, torch.Generator(self.device).manual_seed(seed * 1024 + rank + 1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        if call.name == "product":
            return [normal(call.rows, call.inner).bfloat16(), normal(call.columns, call.inner).bfloat16()]
        if call.name == "parts":
            return [normal(call.inner, call.rows, call.columns)]
        return [normal(call.rows, call.columns).mul(4).round().bfloat16()]  # with ties

    def fill(self, seed: int) -> None:
        """Inputs from this seed, and the exact result."""
        brought = [self._of(seed, rank) for rank in self.ranks]
        for tensor, value in zip(self.inputs, brought[self.group.rank()], strict=True):
            tensor.copy_(value)
        if self.call.name == "argmax":
            self.exact = torch.cat([x for (x,) in brought], dim=1).argmax(-1)
            return
        eps = torch.finfo(torch.bfloat16).eps
        if self.call.name == "product":
            sums = [x.double() @ w.double().T for x, w in brought]
            within = sum(x.double().abs() @ w.double().abs().T for x, w in brought)
        else:
            sums = [parts.double().sum(0) for (parts,) in brought]
            within = sum(parts.double().abs().sum(0) for (parts,) in brought)
        # Each rank's is rounded, and their sum; float32 sums are nearly exact.
        self.exact = sum(sums)
        self.bound = eps * (sum(x.abs() for x in sums) + self.exact.abs()) + 1e-5 * within

    def run(self) -> tuple[torch.Tensor, ...]:
        call = self.call
        if call.name == "product":
            return (linear_all_reduce(*self.inputs, self.group, call.recipe),)
        if call.name == "parts":
            return (reduce_parts(*self.inputs, torch.bfloat16, self.group, call.recipe),)
        return (argmax_over_ranks(*self.inputs, self.group.rank() * call.columns, call.columns, self.group),)

    def off(self, result: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The largest error over its bound, float64 []: above 1 is wrong."""
        if self.call.name == "argmax":
            return torch.where((result[0] == self.exact).all(), 0.0, torch.inf).double()
        return ratio_to_bound(result[0], self.exact, self.bound)
