"""What ranks and Triton's interpreter are asked about the quantized all-reduce."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from interpreter import patch_interpreter

from megatron_ssm_tp import UserError
from megatron_ssm_tp.comm import collectives, quantize
from megatron_ssm_tp.comm.autocast import allreduce_autocast, recipe_of
from megatron_ssm_tp.comm.mappings import reduce_from_tensor_model_parallel_region
from megatron_ssm_tp.comm.payload import Layout
from megatron_ssm_tp.comm.recipes import AllReduceRecipe, Int4BlockScaling, Int8BlockScaling

SITE = "decoder.layers.0.mixer.out_proj"
ALWAYS_ONE_SHOT, ALWAYS_TWO_SHOT = 1 << 40, -1


def contribution(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of one rank, with an outlier every few values and a row of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank))
    if x.dim() > 1:
        x[..., ::7] *= 50
        x[0] = 0
    return x.to(dtype)


@lru_cache
def group_of(ranks: tuple[int, ...]) -> Any:
    return dist.new_group(list(ranks))


def world() -> dist.ProcessGroup:
    return dist.group.WORLD


def reduced(
    shape: tuple[int, ...], dtype: torch.dtype, recipe: AllReduceRecipe, extra: int, exact_columns: int = 0
) -> np.ndarray:
    """The bytes of this rank's result."""
    x = contribution(shape, dist.get_rank(), dtype)
    before = x.clone()
    out = collectives.all_reduce(x, world(), recipe, exact_columns=exact_columns, one_shot_extra_bytes=extra)
    assert torch.equal(x, before) and out.is_contiguous() and out.shape == x.shape and out.dtype == dtype
    return out.flatten().view(torch.uint8).numpy()


def specials(recipe: AllReduceRecipe, extra: int) -> np.ndarray:
    """NaN of one rank, Inf of one, Inf of all, Inf and -Inf, at places 3, 4, 5, 6 of row 1; ones elsewhere."""
    rank, x = dist.get_rank(), torch.ones(8, 40)
    x[1, 3] = torch.nan if rank == 1 else 1
    x[1, 4] = torch.inf if rank == 0 else 1
    x[1, 5] = -torch.inf
    x[1, 6] = torch.inf if rank == 0 else -torch.inf
    return collectives.all_reduce(x, world(), recipe, one_shot_extra_bytes=extra).numpy()


def off_like_megatron(dtype: torch.dtype, recipe: AllReduceRecipe | None) -> bool:
    """Whether the mapping gives Megatron's bits and its aliasing."""
    from megatron.core.tensor_parallel import mappings

    x = contribution((3, 2, 33), dist.get_rank(), dtype)
    ours, theirs = x.clone(), x.clone()
    found = reduce_from_tensor_model_parallel_region(ours, world(), recipe)
    expected = mappings.reduce_from_tensor_model_parallel_region(theirs, group=world())
    return torch.equal(found, expected) and found.data_ptr() == ours.data_ptr() and torch.equal(ours, theirs)


def gradient(recipe: AllReduceRecipe | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, and the gradients of the output and of the input."""
    x = contribution((4, 33), dist.get_rank(), torch.float32).requires_grad_()
    out = reduce_from_tensor_model_parallel_region(x * 1.0, world(), recipe)
    weight = torch.linspace(-1, 1, 4 * 33).view(4, 33)
    (out * weight).sum().backward()
    return out.detach().numpy(), weight.numpy(), x.grad.numpy()


def collectives_sent(values: int, recipe: AllReduceRecipe | None) -> list[tuple]:
    from collective_jobs import collectives_recorded

    with collectives_recorded(world()) as sent:
        reduce_from_tensor_model_parallel_region(torch.ones(values), world(), recipe)
    return sent


def autocast_by_group() -> list[str]:
    """The recipes of two groups of ranks within a context of one of them, and around it."""
    one, other = group_of((0, 1)), group_of((1, 2))
    mine = [group for group in (one, other) if group is not dist.GroupMember.NON_GROUP_MEMBER]

    def now() -> str:
        return "/".join(str(getattr(recipe_of(SITE, group), "name", None)) for group in (*mine, world()))

    found = [now()]
    restricted = one if one in mine else None
    with allreduce_autocast(recipe=Int4BlockScaling()), allreduce_autocast(recipe=Int8BlockScaling(), group=restricted):
        found.append(now())
        with allreduce_autocast(enabled=False, group=restricted):
            found.append(now())
    return [*found, now()]


def error_of_all_reduce(case: str) -> str:
    """The one line that a wrong call raises; on every rank."""
    x, recipe, group, columns = torch.ones(2, 4), Int8BlockScaling(), world(), 0
    if case == "dtype":
        x = x.double()
    elif case == "group":
        group = dist.GroupMember.NON_GROUP_MEMBER
    elif case == "exact_columns":
        columns = 4
    try:
        collectives.all_reduce(x, group, recipe, exact_columns=columns)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def sub_group_sum(ranks: tuple[int, ...]) -> np.ndarray | None:
    """A reduction among some of the ranks; None on the others."""
    group = group_of(ranks)
    if dist.get_rank() not in ranks:
        return None
    return collectives.all_reduce(torch.full((5,), 1.0 + dist.get_rank()), group, Int8BlockScaling()).numpy()


# --- Triton's interpreter -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def kernels() -> Any:
    """quantize_triton, in a process that was started with TRITON_INTERPRET=1."""
    patch_interpreter()
    from megatron_ssm_tp.comm import quantize_triton

    return quantize_triton


def compare_encoding(x: np.ndarray | torch.Tensor, recipe: AllReduceRecipe, parts: int) -> str:
    """Where the kernel's payload of x differs from the reference's; empty if nowhere."""
    x = torch.as_tensor(x)
    layout = Layout(recipe, x.numel(), parts)
    found, expected = kernels().encode(x, layout), quantize.encode(x, layout)
    wrong = (found != expected)[:, : layout.exact_at].nonzero()
    return "" if not len(wrong) else f"bytes {wrong[:5].tolist()} of {layout}"


def compare_decoding(
    payloads: np.ndarray, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, row_stride: int | None
) -> str:
    """Where decode_sum and sum_and_encode differ of payloads uint8 [p, parts, part_bytes], any bytes as codes."""
    payloads = torch.from_numpy(payloads)
    wide = (*shape[:-1], row_stride or shape[-1])
    found, expected = torch.full(wide, 3, dtype=dtype), torch.full(wide, 3, dtype=dtype)
    kernels().decode_sum(payloads, layout, found[..., : shape[-1]])
    quantize.decode_sum(payloads, layout, expected[..., : shape[-1]])
    problem = _differ(found, expected)
    if problem or layout.parts > 1:
        return problem
    alone = layout.one_part()
    found, expected = kernels().sum_and_encode(payloads, alone), quantize.sum_and_encode(payloads, alone)
    wrong = (found != expected)[:, : layout.exact_at].nonzero()
    return "" if not len(wrong) else f"sum_and_encode: bytes {wrong[:5].tolist()}"


def _differ(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Bitwise, but for which NaN it is."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    wrong = (~same).nonzero()
    return "" if not len(wrong) else f"{wrong[:5].tolist()}: {found[~same][:5]} for {expected[~same][:5]}"
