"""What ranks without the interpreter are asked about the symmetric backend's host side, and kernels compiled there."""

from typing import Any

import torch
import torch.distributed as dist
from hopper import compiled

from megatron_ssm_tp import UserError
from megatron_ssm_tp.comm.recipes import Int8BlockScaling
from megatron_ssm_tp.comm.workspace import Workspace


def reasons_without_buffers(case: str) -> list[str]:
    """Why a group gets no buffers when one rank fails: asked twice, by the group's first call and by its second."""
    from unittest import mock

    from megatron_ssm_tp.comm import symmetric

    group, last = dist.new_group(list(range(dist.get_world_size()))), dist.get_rank() == dist.get_world_size() - 1
    x = mock.Mock(is_cuda=True, dtype=torch.bfloat16, device=mock.Mock(index=0))
    replaced = {"_what_is_missing": lambda: "", "_zeros": lambda ranks: torch.zeros(1), "_rendezvous": _no_rendezvous}
    if case == "no memory" and last:
        replaced["_zeros"] = mock.Mock(side_effect=RuntimeError("out of memory\nand more"))
    elif case == "no triton" and last:
        replaced["_what_is_missing"] = lambda: "a rank has no triton"
    elif case == "one rank's peer access" and not last:
        replaced["_rendezvous"] = lambda *_: mock.create_autospec(Workspace, instance=True)
    elif case == "two hosts":
        replaced["socket"] = mock.Mock(gethostname=lambda: f"node{dist.get_rank()}")
    with (
        mock.patch.multiple(symmetric, **replaced),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
        mock.patch("torch.cuda.current_device", lambda: 0),
    ):
        found = [symmetric.supports(x, group, Int8BlockScaling()) for _ in range(2)]
    assert not any(ok for ok, _ in found)
    return [reason for _, reason in found]


def _no_rendezvous(group: dist.ProcessGroup, memory: torch.Tensor, timeout_s: float) -> None:
    raise RuntimeError("no peer access")


def illegal_columns() -> list[str]:
    """What both backends say to more exact columns than there are."""
    from megatron_ssm_tp.comm.backends import BACKENDS

    said = []
    for backend in BACKENDS.values():
        try:
            backend.all_reduce(torch.ones(2, 4), dist.group.WORLD, Int8BlockScaling(), exact_columns=5)
        except UserError as error:
            said.append(str(error))
    assert len(said) == len(BACKENDS) > 1
    return said


def supported_under_capture() -> tuple[bool, str]:
    from unittest import mock

    from megatron_ssm_tp.comm import symmetric

    group = dist.new_group(list(range(dist.get_world_size())))
    x = mock.Mock(is_cuda=True, dtype=torch.bfloat16, device=mock.Mock(index=0))
    with (
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: True),
        mock.patch("torch.cuda.current_device", lambda: 0),
    ):
        return symmetric.supports(x, group, Int8BlockScaling())


def warnings_of_a_fallback() -> list[str]:
    """What is said when "auto" cannot take the symmetric backend on GPUs, and when "collective" is asked for."""
    import warnings
    from unittest import mock

    from megatron_ssm_tp.comm import backends

    group = dist.new_group(list(range(dist.get_world_size())))
    x = mock.Mock(is_cuda=True, dtype=torch.bfloat16)
    refused = backends.BACKENDS["symmetric"]._replace(supports=lambda *_: (False, "no peer access"))
    with warnings.catch_warnings(record=True) as said, mock.patch.dict(backends.BACKENDS, symmetric=refused):
        warnings.simplefilter("always")
        for name in ("auto", "collective"):
            assert backends.choose(x, group, Int8BlockScaling(backend=name)) is backends.BACKENDS["collective"]
    return [str(warning.message) for warning in said]


def fused_errors() -> list[str]:
    from megatron_ssm_tp.comm.fused import all_reduce_add_norm

    x, said = torch.ones(2, 4), []
    for residual, weight in [
        (x, torch.ones(4, requires_grad=True)),
        (torch.ones(2, 3), torch.ones(4)),
        (x, torch.ones(3)),
    ]:
        try:
            all_reduce_add_norm(x, residual, weight, 1e-5, dist.group.WORLD, Int8BlockScaling())
        except UserError as error:
            said.append(str(error))
    return said


def compile_for_hopper(kernel: str, shape: dict, ones: dict[str, int]) -> Any:
    """A kernel of symmetric_triton.py as it would be launched on bfloat16 tensors."""
    from megatron_ssm_tp.comm import symmetric_triton
    from megatron_ssm_tp.comm.tile_steps import Shape

    default = {"rank": 0, "ranks": 2, "block_size": 128, "tile_blocks": 16, "blocks": 16, "contiguous": True}
    flags = {"ragged": False, "flagged": True, "split": False, "add_norm": False, "exact": False}
    flags |= {"parts": 1, "threads": 256, "overlaps": True}
    whole = Shape(**default | flags | shape)
    function = getattr(symmetric_triton, kernel)
    constants = {"S": whole, "EXACT_TILE": symmetric_triton.EXACT_TILE} | ones

    def type_of(name: str) -> object:
        if name in ("buffers", "flags"):
            return ("i64",) * whole.ranks
        if name.endswith("_ptr"):
            return "*i32" if name == "counters_ptr" else "*bf16"
        return "fp32" if name == "eps" else "i32"

    types = {name: type_of(name) for name in function.arg_names}
    options = {"num_warps": whole.threads // 32, "enable_fp_fusion": False}
    return compiled(function, types, constants, options, ("_ptr", "_stride"))


def exchanges_for_hopper() -> list[dict]:
    """exchange_triton.py's kernels for x_proj's product and for a vocabulary of Falcon-Mamba-7B's, on two ranks."""
    from megatron_ssm_tp.comm.exchange_triton import BLOCK, WARPS, argmax_row_over_ranks, sum_products
    from megatron_ssm_tp.ops.few_rows_launch import pick_launch

    ranks, made = {"RANK": 1, "RANKS": 2, "OVERLAPS": True}, []
    link = {
        "buffers": ("i64", "i64"),
        "half_bytes": "i32",
        "words_at": "i32",
        "patience": "i32",
        "counters_ptr": "*i32",
    }
    for requests in (1, 2):
        how = pick_launch(288, 4096, requests)
        types = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16") | link | {"rows": "i32", "x_stride": "i32"}
        constants = {"UNIT": 8, "COLUMNS": 4096, "REQUESTS": requests, "ROWS": how.rows, "BLOCK_K": how.block_k}
        constants |= {"STAGES": how.stages, "THREADS": 32 * how.warps} | ranks
        made.append(_for_hopper(sum_products, types, constants, how.warps))
    types = {"x_ptr": "*bf16", "out_ptr": "*i64", **link, **dict.fromkeys(("x_stride", "columns", "first"), "i32")}
    constants = {"BLOCK": BLOCK, "THREADS": 32 * WARPS} | ranks
    return [*made, _for_hopper(argmax_row_over_ranks, types, constants, WARPS)]


def _for_hopper(kernel: Any, types: dict, constants: dict, warps: int) -> dict:
    return compiled(kernel, types, constants, {"num_warps": warps}, ("_ptr", "_stride")).asm


def words_shared(recipes: list) -> list[bool]:
    """exchange.shares_words of 16 bytes of bfloat16 where the symmetric backend is there; last, of float32."""
    from unittest import mock

    from megatron_ssm_tp.comm import exchange, symmetric

    x = torch.zeros(8, dtype=torch.bfloat16)
    with mock.patch.object(symmetric, "supports", lambda *_: (True, "")):
        found = [exchange.shares_words(x, dist.group.WORLD, recipe) for recipe in recipes]
        return [*found, exchange.shares_words(x.float(), dist.group.WORLD, recipes[1])]
