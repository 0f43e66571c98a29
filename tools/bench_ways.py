"""The ways to sum a tensor over ranks that bench_allreduce.py times, and what each must give."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from measure import prepare_symmetric

from megatron_ssm_tp.comm import backends
from megatron_ssm_tp.comm.fused import all_reduce_add_norm
from megatron_ssm_tp.comm.recipes import RECIPE_NAMES, recipe_by_name
from megatron_ssm_tp.ops.norm import add_rms_norm

KINDS = ("nccl", "symm_mem", "collective", "symmetric", "fused")
RECIPES = tuple(name for name in RECIPE_NAMES if name != "none")
EPS = 1e-5
Result = tuple[torch.Tensor, ...]


class Way(NamedTuple):
    """What is timed.

    Args:
        name: in the table.
        run: one call; its result, one tensor or (new residual, normed).
        refresh: restores what `run` overwrites; None if it overwrites nothing.
        eager, graph: how it is measured.
        rival: whether others are measured against the best of these.
    """

    name: str
    run: Callable[[], Result]
    refresh: Callable[[], object] | None = None
    eager: bool = True
    graph: bool = True
    rival: bool = False


class Case:
    """One size: tensors bfloat16 [tokens, hidden], an outlier channel in x; x differs between ranks, the others do not.

    `sums` and `fused` are the exact results in float32. With `wide_residual` the residual is float32 too.
    """

    def __init__(self, tokens: int, hidden: int, device: torch.device, wide_residual: bool = False) -> None:
        own = torch.Generator(device).manual_seed(100 + dist.get_rank())
        common = torch.Generator(device).manual_seed(99)

        def normal(*shape: int, generator: torch.Generator = common) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        self.x = normal(tokens, hidden, generator=own) * 0.5
        self.x[:, 7] *= 40
        self.buffer = self.x.clone()  # for what sums in place
        self.residual, self.weight = normal(tokens, hidden), normal(hidden)
        if wide_residual:
            self.residual = self.residual.float()
        total = self.x.float()
        dist.all_reduce(total)
        self.sums: Result = (total,)

    def fused(self) -> Result:
        total = self.residual.float() + self.sums[0]
        scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
        return total, total * scale * self.weight.float()

    def restore(self) -> None:
        self.buffer.copy_(self.x)


class Ways:
    """The ways that there are here; `missing` says of the others why not.

    Args:
        kinds: of KINDS.
        block_size: of all recipes.
        values: of the largest tensor.
        timeout_s: for the backend "symmetric".
    """

    def __init__(self, kinds: list[str], block_size: int, values: int, device: torch.device, timeout_s: float) -> None:
        self.kinds, self.block_size, self.group = kinds, block_size, dist.group.WORLD
        self.missing: dict[str, str] = {}
        wanted = {"symmetric", "fused"} & set(kinds)
        reason = prepare_symmetric([self.group], device, timeout_s) if wanted else ""
        if "symmetric" in kinds and reason:
            self.missing["symmetric"] = reason
        if "fused" in kinds and reason:
            self.missing["fused"] = reason
        if "symm_mem" in kinds:
            self.shared = self._shared(values, device)

    def _shared(self, values: int, device: torch.device) -> torch.Tensor | None:
        """Symmetric memory of torch's for the largest tensor."""
        if device.type != "cuda":
            self.missing["symm_mem"] = "needs GPUs"
            return None
        from torch.distributed import _symmetric_memory as symmetric_memory

        try:
            memory = symmetric_memory.empty(values, dtype=torch.bfloat16, device=device)
            symmetric_memory.rendezvous(memory, self.group)
        except RuntimeError as error:
            self.missing["symm_mem"] = str(error).splitlines()[0]
            return None
        return memory

    def sums(self, case: Case) -> Iterator[Way]:
        """Of x alone."""
        if "nccl" in self.kinds:
            yield Way(dist.get_backend(), lambda: (self._plain(case),), case.restore, rival=True)
        if "symm_mem" in self.kinds and "symm_mem" not in self.missing:
            yield from self._of_torch(case)
        for backend in ("collective", "symmetric"):
            if backend in self.kinds and backend not in self.missing:
                for name in RECIPES:
                    run = self._by_recipe(case, name, backend)
                    yield Way(f"{name} {backend}", run, graph=backend == "symmetric")

    def fused(self, case: Case) -> Iterator[Way]:
        """Of x, added to the residual and normed."""
        if "fused" not in self.kinds:
            return
        name = f"{dist.get_backend()}, add-norm kernel"
        rest = (case.residual, case.weight, EPS)
        yield Way(name, lambda: add_rms_norm(self._plain(case), *rest), case.restore, rival=True)
        if "fused" not in self.missing:
            for name in RECIPES:
                recipe = recipe_by_name(name, block_size=self.block_size, backend="symmetric")
                arguments = (case.x, case.residual, case.weight, EPS, self.group, recipe)
                yield Way(f"{name} fused", lambda arguments=arguments: all_reduce_add_norm(*arguments))

    def _plain(self, case: Case) -> torch.Tensor:
        dist.all_reduce(case.buffer, group=self.group)
        return case.buffer

    def _of_torch(self, case: Case) -> Iterator[Way]:
        """torch's own kernels without multicast. x is taken to be in their memory already."""
        x, name = self.shared[: case.x.numel()].view(case.x.shape), self.group.group_name

        def restore() -> None:
            x.copy_(case.x)

        one, two = torch.ops.symm_mem.one_shot_all_reduce, torch.ops.symm_mem.two_shot_all_reduce_
        restore()
        yield Way("symm_mem one-shot", lambda: (one(x, "sum", name),))
        yield Way("symm_mem two-shot", lambda: (two(x, "sum", name),), restore)

    def _by_recipe(self, case: Case, name: str, backend: str) -> Callable[[], Result]:
        recipe = recipe_by_name(name, block_size=self.block_size, backend=backend)
        return lambda: (backends.all_reduce(case.x, self.group, recipe),)
