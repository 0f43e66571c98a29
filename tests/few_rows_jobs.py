"""What Triton's interpreter is asked about products of few rows and the step made of them."""

from unittest import mock

import torch
from interpreter import patch_interpreter

from megatron_ssm_tp.ops import dt_step
from megatron_ssm_tp.ops.few_rows import joined
from megatron_ssm_tp.ops.few_rows_launch import FewRowsLaunch, TilesLaunch, pick_launch

ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def product(requests: int, rows: int, columns: int, dtype: torch.dtype, gap: int, launch: FewRowsLaunch | None) -> str:
    patch_interpreter()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    from megatron_ssm_tp.ops.few_rows_triton import few_rows_product

    g = torch.Generator().manual_seed(columns)
    x = torch.randn(requests, columns + gap, generator=g).to(dtype)[:, gap:]
    weight = torch.randn(rows, columns, generator=g).to(dtype)
    how = launch or pick_launch(rows, columns, requests)
    found, expected = few_rows_product(x, weight, how), x.double() @ weight.double().T
    error = float((found - expected).abs().max() / expected.abs().max())
    return "" if found.dtype == dtype and error <= ERRORS[dtype] else f"product {error}"


def tiles(requests: int, rows: int, columns: int, dtype: torch.dtype, gap: int, launch: TilesLaunch) -> str:
    patch_interpreter()
    torch.use_deterministic_algorithms(True)
    from megatron_ssm_tp.ops.tiles_triton import tiles_product

    g = torch.Generator().manual_seed(columns)
    x = torch.randn(requests, columns + gap, generator=g).to(dtype)[:, gap:]
    weight = torch.randn(rows, columns, generator=g).to(dtype)
    parts, expected = tiles_product(x, weight, launch), x.double() @ weight.double().T
    if parts.shape != (launch.parts, requests, rows) or parts.dtype != (dtype if launch.parts == 1 else torch.float32):
        return f"{parts.dtype} {parts.shape}"
    error = float((joined(parts, dtype) - expected).abs().max() / expected.abs().max())
    return "" if error <= ERRORS[dtype] else f"product {error}"


def step(requests: int, channels: int, dt_rank: int, d_state: int, dtype: torch.dtype, eps: float | None) -> str:
    """y and the states against those of the three operators apart; a slot of -1 is left alone."""
    patch_interpreter()
    torch.use_deterministic_algorithms(True)
    g = torch.Generator().manual_seed(requests + channels)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    columns = dt_rank + 2 * d_state
    bcdt, x, z = (normal(requests, width + 3).to(dtype)[:, 3:] for width in (columns, channels, channels))
    weight, bias = (normal(channels, dt_rank) * 0.2).to(dtype), normal(channels).to(dtype)
    given = (bcdt, x, z, weight, -torch.exp(normal(channels, d_state)), normal(channels), bias)
    states, slots = normal(11, channels, d_state), torch.randperm(10, generator=g)[:requests]
    ours, theirs, padded = states.clone(), states.clone(), states.clone()
    expected = dt_step.dt_and_step(*given, theirs, slots, eps)
    with mock.patch.object(dt_step, "kernels_can_take", lambda *tensors: True):
        found = dt_step.dt_and_step(*given, ours, slots, eps)
        hidden = slots.clone()
        hidden[0] = -1
        dt_step.dt_and_step(*given, padded, hidden, eps)
    problems = []
    for name, a, b in (("y", found, expected), ("states", ours, theirs)):
        error = float((a.double() - b.double()).abs().max() / b.double().abs().max())
        if not error <= (ERRORS[dtype] if name == "y" else 2 * ERRORS[dtype]):
            problems.append(f"{name} {error}")
    if not (torch.equal(padded[slots[0]], states[slots[0]]) and torch.equal(padded[-1], states[-1])):
        problems.append("a slot of -1 was written")
    return ", ".join(problems)
