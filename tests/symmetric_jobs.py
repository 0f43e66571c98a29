"""What ranks in Triton's interpreter are asked about the symmetric backend's kernels, over a file that they all map."""

import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from comm_jobs import ALWAYS_ONE_SHOT, ALWAYS_TWO_SHOT, contribution, kernels

from megatron_ssm_tp.comm import collectives
from megatron_ssm_tp.comm.recipes import AllReduceRecipe, Bf16
from megatron_ssm_tp.comm.tuning import Launch
from megatron_ssm_tp.comm.workspace import EXACT_VALUES, FLAGS, Workspace
from megatron_ssm_tp.ops.norm import rms_normalize


class Call(NamedTuple):
    """A reduction: of rows `stride` values apart, if that is not 0."""

    shape: tuple[int, ...]
    recipe: AllReduceRecipe
    launch: Launch
    dtype: torch.dtype = torch.bfloat16
    exact_columns: int = 0
    stride: int = 0


@lru_cache
def workspace(directory: Path, codes_bytes: int, patience: int = 1 << 14) -> Workspace:
    """A workspace of all ranks, whose buffers are files of `directory`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = 2 * Workspace.bytes_of_half(ranks, codes_bytes)
    if rank == 0:
        directory.mkdir()
        for peer in range(ranks):
            with open(directory / str(peer), "wb") as file:
                file.truncate(size + 2 * FLAGS * 4)  # zeros
    dist.barrier()
    files = [str(directory / str(peer)) for peer in range(ranks)]
    memory = [torch.UntypedStorage.from_file(file, shared=True, nbytes=size + 2 * FLAGS * 4) for file in files]
    buffers = tuple(storage.data_ptr() for storage in memory)
    counters = torch.zeros(2, dtype=torch.int32)
    return Workspace(rank, ranks, buffers, tuple(b + size for b in buffers), counters, patience, memory, codes_bytes)


@lru_cache(maxsize=1)
def _let_others_run_while_waiting() -> None:
    """Ranks that look for what has not arrived give their core to those that will send it."""
    import triton.runtime.interpreter as interpreter

    builder = interpreter.InterpreterBuilder
    load, atomic = builder.create_masked_load, builder.create_atomic_rmw

    def yielding_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        if is_volatile:
            time.sleep(2e-4)
        return load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def yielding_atomic(self, *args):
        time.sleep(2e-4)
        return atomic(self, *args)

    builder.create_masked_load, builder.create_atomic_rmw = yielding_load, yielding_atomic


def _launch_module():
    kernels()
    _let_others_run_while_waiting()
    from megatron_ssm_tp.comm import symmetric_launch

    return symmetric_launch


def _contribution(call: Call, seed: int) -> torch.Tensor:
    shape = (*call.shape[:-1], call.stride) if call.stride else call.shape
    x = contribution(shape, dist.get_rank() + 10 * seed, call.dtype)
    return x[..., : call.shape[-1]] if call.stride else x


def reduced(
    directory: Path, calls: list[Call], codes_bytes: int = 1 << 20, exact_values: int = EXACT_VALUES
) -> list[tuple[np.ndarray, bool]]:
    """Of each call, one after the other: the result's bytes, and whether they are those of the collective backend."""
    found, space = [], replace(workspace(directory, codes_bytes), exact_values=exact_values)
    for seed, call in enumerate(calls):
        x = _contribution(call, seed)
        before = x.clone()
        assert x.any() or x.dim() < 2 or len(x) < 2  # the first row of several is zero, and no other
        out = _launch_module().reduce(space, x, call.recipe, call.exact_columns, call.launch)
        assert torch.equal(x, before) and out.is_contiguous() and out.shape == x.shape and out.dtype == call.dtype
        extra = ALWAYS_TWO_SHOT if call.launch.way == "two-shot" else ALWAYS_ONE_SHOT
        expected = collectives.all_reduce(
            x, dist.group.WORLD, call.recipe, exact_columns=call.exact_columns, one_shot_extra_bytes=extra
        )
        assert space.counters.tolist()[1] == 0  # no program of the call is missing
        found.append((out.flatten().view(torch.uint8).numpy(), torch.equal(out, expected)))
    return found


def in_a_row(
    directory: Path, calls: list[Call], late_s: float, last_epoch: int | None = None
) -> list[tuple[np.ndarray, bool]]:
    """As reduced, with nothing between the calls that ranks would wait for each other in, and a last rank that reads
    what has arrived so long after it has sent its own; `last_epoch` is the number of the call before, if given."""
    import triton.runtime.interpreter as interpreter

    module, space, builder = _launch_module(), workspace(directory, 1 << 20), interpreter.InterpreterBuilder
    if last_epoch is not None:
        space = replace(space, counters=torch.tensor([last_epoch, 0], dtype=torch.int32))
    inputs = [_contribution(call, seed) for seed, call in enumerate(calls)]
    atomic, last = builder.create_atomic_rmw, dist.get_rank() == dist.get_world_size() - 1

    def late_atomic(self, *args):
        done = atomic(self, *args)
        time.sleep(late_s if last else 0)
        return done

    builder.create_atomic_rmw = late_atomic
    try:
        outs = [module.reduce(space, x, call.recipe, 0, call.launch) for x, call in zip(inputs, calls, strict=True)]
    finally:
        builder.create_atomic_rmw = atomic
    found = []
    for x, call, out in zip(inputs, calls, outs, strict=True):
        extra = ALWAYS_TWO_SHOT if call.launch.way == "two-shot" else ALWAYS_ONE_SHOT
        expected = collectives.all_reduce(x, dist.group.WORLD, call.recipe, one_shot_extra_bytes=extra)
        found.append((out.flatten().view(torch.uint8).numpy(), torch.equal(out, expected)))
    return found


def specials(directory: Path, recipe: AllReduceRecipe, launch: Launch) -> np.ndarray:
    """As comm_jobs.specials."""
    rank, x = dist.get_rank(), torch.ones(8, 40)
    x[1, 3] = torch.nan if rank == 1 else 1
    x[1, 4] = torch.inf if rank == 0 else 1
    x[1, 5] = -torch.inf
    x[1, 6] = torch.inf if rank == 0 else -torch.inf
    return _launch_module().reduce(workspace(directory, 1 << 20), x, recipe, 0, launch).numpy()


def add_norm(directory: Path, call: Call, weight_dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, str]:
    """The new residual and the norm of the fused kernel, as float32, and where they are not those of three steps."""
    x = _contribution(call, 0)
    generator = torch.Generator().manual_seed(5)
    residual = torch.randn(call.shape, generator=generator).to(call.dtype)
    weight = torch.rand(call.shape[-1], generator=generator).to(weight_dtype)
    module, space = _launch_module(), workspace(directory, 1 << 20)
    problem = ""
    for eps in (1e-5, 100.0):  # the same call but for it
        stream, normed = module.reduce_add_norm(space, x, residual, weight, eps, call.recipe, call.launch)
        expected = module.reduce(space, x, call.recipe, 0, call.launch) + residual
        problem += _differ_from_steps(stream, normed, expected, weight, eps)
    return stream.float().numpy(), normed.float().numpy(), problem


def _differ_from_steps(
    stream: torch.Tensor, normed: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor, eps: float
) -> str:
    """Where a new residual and its norm are not `expected` and its norm."""
    their_norm = weight * rms_normalize(expected.to(weight.dtype), eps)
    problem = "" if torch.equal(stream, expected) else "residual "
    # the mean of squares is summed in another order: a last bit of the result may differ
    near = torch.allclose(normed.float(), their_norm.float(), rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-30)
    return problem if near and normed.dtype == their_norm.dtype else problem + "norm "


def fused_by_recipe(directory: Path, launch: Launch) -> str:
    """comm.fused.all_reduce_add_norm where the symmetric backend is there: who reduces, and whether rightly."""
    from unittest import mock

    from megatron_ssm_tp.comm import fused, symmetric

    module, space, group = _launch_module(), workspace(directory, 1 << 20), dist.group.WORLD
    # One row, of weight's shape: had the two changed places, the sum would be wrong and nothing written outside it.
    x = _contribution(Call((64,), Bf16(32), launch), 0)
    residual, weight = torch.randn(64, generator=torch.Generator().manual_seed(5)), torch.arange(1.0, 65.0)
    called, problem = mock.Mock(side_effect=module.reduce_add_norm), ""
    there = {"supports": lambda *_: (True, ""), "_workspaces": {group: space}}
    with (
        mock.patch.multiple(symmetric, **there),
        mock.patch.object(symmetric, "_kernels", lambda: mock.Mock(reduce_add_norm=called)),
    ):
        for backend in ("symmetric", "auto", "collective"):
            recipe = Bf16(32, backend=backend)
            stream, normed = fused.all_reduce_add_norm(x, residual, weight, 1e-5, group, recipe)
            expected = residual + collectives.all_reduce(x, group, recipe)
            problem += _differ_from_steps(stream, normed, expected, weight, 1e-5)
    return problem + ("" if called.call_count == 2 else f"called {called.call_count} times")


def lost_peer(directory: Path, recipe: AllReduceRecipe, launch: Launch) -> str:
    """What the last rank sees of a reduction that nobody else takes part in."""
    space = workspace(directory, 1 << 20, 300)
    if dist.get_rank() < dist.get_world_size() - 1:
        return ""
    try:
        _launch_module().reduce(space, torch.ones(64), recipe, 0, launch)
    except BaseException as error:
        return f"{type(error).__name__}: {error} {error.__cause__}"
    return "no error"


def parts_reduced(directory: Path, recipes: list[AllReduceRecipe], launches: list[Launch]) -> list[str]:
    """Reductions of x in parts that are not those of x; and fused ones."""
    module, space, wrong = _launch_module(), workspace(directory, 1 << 20), []
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    residual, weight = torch.randn(3, 96).bfloat16(), torch.rand(96).bfloat16()
    for recipe, launch in [(recipe, launch) for recipe in recipes for launch in launches]:
        # Sums that bfloat16 holds: then they are rounded nowhere.
        parts = torch.randint(-30, 30, (4, 3, 96), generator=generator).float()
        x = parts.sum(0).bfloat16()
        out = module.reduce(space, parts, recipe, 0, launch, torch.empty_like(x))
        if not torch.equal(out, module.reduce(space, x, recipe, 0, launch)):
            wrong.append(f"{recipe} {launch}")
        found = module.reduce_add_norm(space, parts, residual, weight, 1e-5, recipe, launch)
        if not all(map(torch.equal, found, module.reduce_add_norm(space, x, residual, weight, 1e-5, recipe, launch))):
            wrong.append(f"fused {recipe} {launch}")
    return wrong


def parts_by_recipe(directory: Path) -> str:
    """mappings.reduce_parts and fused.all_reduce_add_norm of parts: who reduces, and whether rightly."""
    from unittest import mock

    from megatron_ssm_tp.comm import fused, mappings, symmetric

    module, space, group = _launch_module(), workspace(directory, 1 << 20), dist.group.WORLD
    parts = torch.randint(-30, 30, (4, 3, 64), generator=torch.Generator().manual_seed(dist.get_rank())).float()
    x, residual, weight = parts.sum(0).bfloat16(), torch.randn(3, 64).bfloat16(), torch.rand(64).bfloat16()
    reduce, add_norm = mock.Mock(side_effect=module.reduce), mock.Mock(side_effect=module.reduce_add_norm)
    there, problem = {"supports": lambda *_: (True, ""), "_workspaces": {group: space}}, ""
    with (
        mock.patch.multiple(symmetric, **there),
        mock.patch.dict("megatron_ssm_tp.comm.backends.BACKENDS", symmetric=_with_support(symmetric)),
        mock.patch.object(symmetric, "_kernels", lambda: mock.Mock(reduce=reduce, reduce_add_norm=add_norm)),
    ):
        for backend, min_bytes in (("auto", 0), ("collective", 0), ("auto", 1000)):
            recipe = Bf16(32, backend=backend, min_bytes=min_bytes)
            expected = collectives.all_reduce(x, group, recipe)
            out = mappings.reduce_parts(parts, x.dtype, group, recipe)
            problem += "" if torch.equal(out, expected) else f"sum by {backend} "
            stream, normed = fused.all_reduce_add_norm(parts, residual, weight, 1e-5, group, recipe)
            problem += _differ_from_steps(stream, normed, residual + expected, weight, 1e-5)
    calls = [call.args[1].shape for call in (*reduce.call_args_list, *add_norm.call_args_list)]
    return problem + ("" if calls == [parts.shape] * 2 else f"kernels got {calls}")


def _with_support(symmetric):
    from megatron_ssm_tp.comm.backends import Backend

    return Backend(lambda *_: (True, ""), symmetric.all_reduce)
