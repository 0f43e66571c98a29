"""What ranks are asked to do with Megatron's TERowParallelLinear. Transformer Engine is not installed.

Megatron's module megatron.core.extensions.transformer_engine is imported a second time, on top of a stand-in for the
package transformer_engine that has what the import asks for, and of that only `Linear` works. It was written after
transformer_engine/pytorch/module/linear.py of TE 2.18 and does, in float32 torch, what that file does of parallelism:
which attributes there are, which of them each forward reads, when it reduces, when it adds a bias, what it returns.
Megatron's classes are thus the real ones; TE's products, fp8 and userbuffers are not there.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from collective_jobs import Sent, collectives_recorded
from jobs import groups
from megatron.core import utils
from megatron.core.transformer import TransformerConfig

from megatron_ssm_tp import RecipeBook, allreduce_autocast, set_recipes
from megatron_ssm_tp.comm.recipes import AllReduceRecipe, Int8BlockScaling
from megatron_ssm_tp.compat.cpu import megatron_on_cpu

EXTENSION = "megatron.core.extensions.transformer_engine"
OURS = "megatron_ssm_tp.layers.te_row_parallel"


class _Product(torch.autograd.Function):
    """TE's _Linear: product and reduction in one function, whose backward reduces nothing for a row-parallel linear."""

    @staticmethod
    def forward(ctx, x, weight, parallel_mode, tp_size, sequence_parallel, group):
        ctx.save_for_backward(x, weight)
        ctx.gathered = parallel_mode == "row" and sequence_parallel
        ctx.group = group
        out = x @ weight.T
        if parallel_mode == "row" and tp_size > 1:
            if sequence_parallel:
                whole, out = out, out.new_empty(out.shape[0] // group.size(), *out.shape[1:])
                dist.reduce_scatter_tensor(out, whole, group=group)
            else:
                dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        if ctx.gathered:
            part = gradient.contiguous()
            gradient = part.new_empty(part.shape[0] * ctx.group.size(), *part.shape[1:])
            dist.all_gather_into_tensor(gradient, part, group=ctx.group)
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2), None, None, None, None


class Linear(torch.nn.Module):
    """te.pytorch.Linear, as far as the docstring of this file says."""

    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
    ):
        super().__init__()
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else tp_group.size()
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features
        self.weight = torch.nn.Parameter(torch.zeros(out_features, self.in_features, dtype=params_dtype, device=device))
        self.bias = torch.zeros(out_features) if bias else torch.Tensor()
        if bias:
            self.bias = torch.nn.Parameter(self.bias)
        self.gemm_bias_unfused_add = parallel_mode == "row" and self.apply_bias

    def get_extra_state(self):
        return torch.ones(3, dtype=torch.uint8)  # fp8 metadata

    def set_extra_state(self, state):
        assert state is None or torch.equal(state, self.get_extra_state())

    def forward(self, inp, is_first_microbatch=None):
        assert inp.shape[-1] == self.in_features, "GEMM not possible"
        out = _Product.apply(inp, self.weight, self.parallel_mode, self.tp_size, self.sequence_parallel, self.tp_group)
        if self.apply_bias and not self.gemm_bias_unfused_add:  # fused with the product
            out = out + self.bias
        if self.gemm_bias_unfused_add:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


def _package() -> dict[str, ModuleType]:
    names = ("", ".common", ".common.recipe", ".pytorch", ".pytorch.fp8", ".pytorch.distributed")
    made = {f"transformer_engine{name}": ModuleType(f"transformer_engine{name}") for name in names}
    for name, module in made.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, module)
    te = made["transformer_engine"]
    te.__version__ = "1.6.0"  # Megatron's module defines what later versions add only for those
    te.pytorch.Linear = Linear
    for place, classes in (
        (te.pytorch, ("LayerNorm", "RMSNorm", "LayerNormLinear", "DotProductAttention")),
        (te.pytorch.fp8, ("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init")),
        (te.common.recipe, ("DelayedScaling",)),
        (te.pytorch.distributed, ("CudaRNGStatesTracker",)),
    ):
        for name in classes:
            setattr(place, name, type(name, (torch.nn.Module,), {}))
    return made


@contextmanager
def _te() -> Iterator[ModuleType]:
    """Megatron's extension on top of the stand-in; all is as before on the way out, packages' attributes too."""
    modules = [name.rpartition(".") for name in (EXTENSION, OURS)]
    with ExitStack() as stack:
        for package, _, name in modules:
            stack.enter_context(mock.patch.object(importlib.import_module(package), name, None, create=True))
        stack.enter_context(mock.patch.dict(sys.modules, _package()))
        stack.enter_context(mock.patch.object(utils, "_te_version", None))
        stack.enter_context(megatron_on_cpu())
        for name in (EXTENSION, OURS):
            sys.modules.pop(name, None)
        yield importlib.import_module(EXTENSION)


def _linear(te: ModuleType, bias: bool, skip_bias_add: bool, *, is_expert: bool = False, **options) -> torch.nn.Module:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=groups().tp.size(),
        **options,
    )
    torch.manual_seed(0)
    linear = te.TERowParallelLinear(
        32,
        24,
        config=config,
        init_method=torch.nn.init.normal_,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=skip_bias_add,
        is_expert=is_expert,
        tp_group=groups().tp,
    )
    if bias:
        torch.nn.init.normal_(linear.bias)
    return linear


def _run(linear: torch.nn.Module) -> tuple[list[np.ndarray | None], list[Sent]]:
    """Output, bias that is returned, gradients of the input, the weight and the bias; and what was sent."""
    tp = groups().tp
    x = torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(1)).chunk(tp.size(), -1)[tp.rank()]
    x = x.contiguous().requires_grad_()
    linear.zero_grad()
    with collectives_recorded(tp) as sent:
        out, bias = linear(x)
        sent = list(sent)
    (out * torch.linspace(-1, 1, 24)).sum().backward()
    found = [out, bias, x.grad, linear.weight.grad, linear.bias.grad if linear.use_bias else None]
    return [None if t is None else t.detach().clone().numpy() for t in found], sent


def swapped(
    bias: bool, skip_bias_add: bool, recipe: AllReduceRecipe | RecipeBook | None, sequence_parallel: bool = False
) -> tuple[list[str], tuple, tuple]:
    """Sites, and `_run` of TE's linear before and after set_recipes in a wrapped model."""
    with _te() as te:
        linear = _linear(te, bias, skip_bias_add, sequence_parallel=sequence_parallel)
        before = _run(linear)
        sites = set_recipes(torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"fc2": linear})}), recipe)
        assert isinstance(linear, te.TERowParallelLinear) and linear.tp_size == groups().tp.size()
        return sites, before, _run(linear)


def in_a_context() -> tuple[list[Sent], list[Sent]]:
    """What a linear without a recipe of its own sends, within allreduce_autocast and after it."""
    with _te() as te:
        linear = _linear(te, True, False)
        set_recipes(torch.nn.ModuleDict({"fc2": linear}), None)
        with allreduce_autocast(recipe=Int8BlockScaling(block_size=16)):
            within = _run(linear)[1]
        return within, _run(linear)[1]


def left_as_they_were() -> list[bool]:
    """Attributes after a forward that fails; names and values in both kinds of checkpoint; a state that is loaded."""
    with _te() as te:
        linear = _linear(te, True, False)
        extra = {"dp_cp_group": groups().dp_cp}
        state, sharded = linear.state_dict(), linear.sharded_state_dict("fc2.", (), extra)
        names = {name: value for name, value in vars(linear).items() if not name.startswith("_")}
        set_recipes(torch.nn.ModuleDict({"fc2": linear}), Int8BlockScaling())
        try:
            linear(torch.ones(2, 1, 7))
        except AssertionError as error:
            failed = "GEMM" in str(error)
        kept = all(vars(linear)[name] is value for name, value in names.items())
        again, resharded = linear.state_dict(), linear.sharded_state_dict("fc2.", (), extra)
        linear.load_state_dict(state)
        same = list(again) == list(state) and all(torch.equal(again[name], state[name]) for name in state)
        shapes = [{k: getattr(v, "global_shape", None) for k, v in s.items()} for s in (sharded, resharded)]
        return [failed, kept, same, shapes[0] == shapes[1], any("_extra_state" in name for name in again)]


def experts_and_subclasses() -> list[str]:
    """Sites of linears that do not reduce, or are of others' making."""
    with _te() as te:
        subclass = _linear(te, True, False)
        subclass.__class__ = type("Other", (te.TERowParallelLinear,), {})
        return set_recipes(
            torch.nn.ModuleList([_linear(te, False, True, is_expert=True), subclass]), Int8BlockScaling(), strict=False
        )
