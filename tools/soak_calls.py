"""Random all-reduces for soak_allreduce.py: calls drawn from a seed, their inputs, and their exact results.

Every rank draws the same calls and makes the inputs of all ranks, so that it knows the exact sum without asking.
"""

import math
from dataclasses import dataclass, replace
from random import Random

import torch
import torch.distributed as dist

from megatron_ssm_tp.comm import backends, symmetric
from megatron_ssm_tp.comm.codes import bound_of_sum
from megatron_ssm_tp.comm.fused import all_reduce_add_norm
from megatron_ssm_tp.comm.recipes import DTYPES, RECIPE_NAMES, AllReduceRecipe, recipe_by_name
from megatron_ssm_tp.comm.tuning import Launch

EPS = 1e-5
FORMATS = tuple(name for name in RECIPE_NAMES if name != "none")
_FUSED_COLUMNS = (256, 512, 1000, 1536, 2560, 4096, 5120, 8192)


@dataclass(frozen=True)
class Call:
    """One all-reduce of x [rows, columns], whose rows are `stride` apart.

    Args:
        group: which of the soak's groups.
        specials: places that are NaN or Inf on some ranks.
        magnitude: of the values.
        fused: all_reduce_add_norm instead.
        launch: of the symmetric backend, instead of its table's.
    """

    group: int
    recipe: AllReduceRecipe
    dtype: torch.dtype
    rows: int
    columns: int
    stride: int
    exact_columns: int = 0
    specials: int = 0
    magnitude: float = 1.0
    fused: bool = False
    launch: Launch | None = None

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.recipe.backend, "add-norm" if self.fused else "sum", self.recipe.name

    def prepare(self, ranks: tuple[int, ...], group: dist.ProcessGroup, device: torch.device) -> "Prepared":
        return Prepared(self, ranks, group, device)


@dataclass(frozen=True)
class Choices:
    """What calls are drawn from: groups 0 .. groups - 1, backends, block sizes, dtypes."""

    groups: int
    backends: tuple[str, ...]
    block_sizes: tuple[int, ...] = (128, 32)
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def draw(self, rng: Random, most_values: int) -> Call:
        """A call of up to that many values, their number's logarithm evenly spread."""
        block_size, backend = rng.choice(self.block_sizes), rng.choice(self.backends)
        call = Call(
            group=rng.randrange(self.groups),
            recipe=recipe_by_name(rng.choice(FORMATS), block_size=block_size, backend=backend),
            dtype=rng.choice(self.dtypes),
            rows=1,
            columns=int(2 ** rng.uniform(0, math.log2(most_values))),
            stride=0,
            specials=rng.randint(1, 5) if rng.random() < 0.1 else 0,
            magnitude=2.0 ** rng.randint(-8, 3),  # eight ranks' sums stay within float16
        )
        if rng.random() < 0.25:
            columns = rng.choice([size for size in _FUSED_COLUMNS if size <= most_values] or [1])
            return replace(call, rows=max(1, call.columns // columns), columns=columns, stride=columns, fused=True)
        if rng.random() < 0.75:
            columns = rng.choice([rng.randint(1, 8192), rng.randint(1, 256), 2560, 4096])
            columns = min(columns, call.columns)
            call = replace(call, rows=call.columns // columns, columns=columns)
        gap = rng.choice([1, 8, 37, 64]) if rng.random() < 0.25 else 0
        exact = rng.randint(1, min(16, call.columns - 1)) if call.columns > 1 and rng.random() < 0.2 else 0
        call = replace(call, stride=call.columns + gap, exact_columns=exact)
        return replace(call, launch=_launch(rng)) if backend == "symmetric" and rng.random() < 0.5 else call


def _launch(rng: Random) -> Launch:
    """Any legal one: all ways are to work at any size."""
    way, chunk = rng.choice(("words", "one-shot", "split", "two-shot")), rng.choice((1, 2, 4))
    return Launch(way, rng.choice((512, 2048)), rng.choice((4, 8)), rng.choice((0, 64, 264)), chunk)


class Prepared:
    """A call's tensors on this rank: x in memory that stays, and what it must give.

    Args:
        ranks: of the call's group.
        group: the process group.
    """

    def __init__(self, call: Call, ranks: tuple[int, ...], group: dist.ProcessGroup, device: torch.device) -> None:
        self.call, self.ranks, self.group, self.device = call, ranks, group, device
        memory = torch.full((call.rows, call.stride), torch.nan, dtype=call.dtype, device=device)
        self.x = memory[:, : call.columns]
        if call.fused:
            self.residual, self.weight = torch.empty_like(self.x), torch.empty_like(self.x[0])

    def fill(self, seed: int) -> None:
        """Inputs from this seed, the same tensors of the same memory, and the exact result."""
        call, generator = self.call, torch.Generator(self.device)
        contributions = [contribution(call, seed, rank, self.device) for rank in self.ranks]
        self.own = contributions[self.group.rank()]
        self.x.copy_(self.own)
        kept = call.columns - call.exact_columns
        values = [x[:, :kept] for x in contributions]
        self.exact = sum(x.double() for x in values)
        # Of two ranks none goes two-shot by itself.
        two_shot = call.launch.way == "two-shot" if call.launch else len(self.ranks) > 2
        self.bound = bound_of_sum(values, call.recipe, two_shot)
        total = contributions[0][:, kept:].float()
        for x in contributions[1:]:
            total = total + x[:, kept:].float()
        self.exact_columns = total.to(call.dtype)
        if call.fused:
            generator.manual_seed(seed)
            for tensor in (self.residual, self.weight):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, device=self.device))

    def run(self) -> tuple[torch.Tensor, ...]:
        """The call: its result, one tensor or (new residual, normed)."""
        call = self.call
        if call.launch is not None:
            options = {"exact_columns": call.exact_columns, "launch": call.launch}
            return (symmetric.all_reduce(self.x, self.group, call.recipe, **options),)
        if not call.fused:
            return (backends.all_reduce(self.x, self.group, call.recipe, exact_columns=call.exact_columns),)
        return all_reduce_add_norm(self.x, self.residual, self.weight, EPS, self.group, call.recipe)

    def off(self, result: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The largest error over its bound, float64 []: above 1 is wrong."""
        kept = self.call.columns - self.call.exact_columns
        shaped = all(t.shape == self.x.shape and t.dtype == self.x.dtype and t.is_contiguous() for t in result)
        if not shaped:
            return self.exact.new_tensor(torch.inf)
        exact, bound, eps = self.exact, self.bound, torch.finfo(self.call.dtype).eps
        if self.call.fused:
            exact = exact + self.residual.double()
            bound = bound + (exact.abs() + bound) * eps
        ratio = ratio_to_bound(result[0][:, :kept], exact, bound)
        ratio = ratio.maximum(_unequal(result[0][:, kept:], self.exact_columns))
        ratio = ratio.maximum(_unequal(self.x, self.own))  # inputs are left alone
        return ratio.maximum(self._norm_off(*result)) if self.call.fused else ratio

    def _norm_off(self, new_residual: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """The norm's error over its bound, given the new residual; rows with NaN or Inf left out.

        Rounded are the residual (if the norm is taken of what was not rounded), the norm and its product with weight.
        """
        wide = new_residual.double()
        exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * self.weight.double()
        finfo = torch.finfo(self.call.dtype)
        bound = exact.abs() * (3 * finfo.eps + 1e-5) + 16 * finfo.smallest_normal * finfo.eps
        rows = wide.isfinite().all(-1, keepdim=True)
        return ratio_to_bound(
            torch.where(rows, normed.double(), 0.0), torch.where(rows, exact, 0.0), bound.nan_to_num(1.0)
        )


def contribution(call: Call, seed: int, rank: int, device: torch.device) -> torch.Tensor:
    """What a rank adds: normal values with outliers, and NaN and Inf at some places, which ranks share."""
    generator = torch.Generator(device).manual_seed(seed * 1024 + rank + 1)
    x = torch.randn(call.rows, call.columns, generator=generator, device=device) * call.magnitude
    x[:, ::7] *= 50
    if call.specials:
        places = min(call.specials, x.numel())
        at = seed % x.numel() + torch.arange(places, device=device) * (x.numel() // places)
        kinds = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf], device=device)
        which = torch.randint(len(kinds), (places,), generator=generator, device=device)
        x.view(-1)[at % x.numel()] = kinds[which]
    return x.to(call.dtype)


def checksum(result: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """int64 [] of a result's bits and their order."""
    total = 0
    for tensor in result:
        bits = tensor.reshape(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16).long()
        total = total * 31 + (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()
    return total


def ratio_to_bound(found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """The largest |found - exact| / bound; where exact is NaN or Inf, found must be the same."""
    found = found.double()
    off = (found - exact).abs()
    ratio = torch.where(off == 0, 0.0, off / bound).nan_to_num(torch.inf)
    same = (found == exact) | (found.isnan() & exact.isnan())
    return torch.where(exact.isfinite(), ratio, torch.where(same, 0.0, torch.inf)).amax()


def _unequal(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """float64 []: 0 if they are equal, NaN to NaN, or else Inf."""
    same = ((found == expected) | (found.isnan() & expected.isnan())).all()
    return torch.where(same, 0.0, torch.inf).double()
