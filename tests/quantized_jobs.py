"""What ranks are asked to do with a whole model whose reductions follow recipes."""

from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from collective_jobs import Sent, collectives_recorded
from jobs import build, groups

from megatron_ssm_tp import LLM, SamplingParams, UserError, allreduce_autocast
from megatron_ssm_tp.comm.recipe_book import RecipeBook
from megatron_ssm_tp.comm.recipes import AllReduceRecipe, Int8BlockScaling
from megatron_ssm_tp.compat.cpu import megatron_on_cpu
from megatron_ssm_tp.layers.model import SSMModel
from megatron_ssm_tp.layers.overlap import HALVES, set_overlap
from megatron_ssm_tp.layers.row_parallel import RecipeRowParallelLinear, set_recipes


def _forward(model: SSMModel, token_ids: list[int]) -> tuple[np.ndarray, list[Sent]]:
    """Logits, and what the decoder's layers sent."""
    ids = torch.tensor([token_ids])
    seen: list[Sent] = []
    with torch.no_grad(), megatron_on_cpu(), collectives_recorded(groups().tp) as sent:
        hooks = [
            model.decoder.register_forward_pre_hook(lambda *_: sent.clear()),
            model.decoder.register_forward_hook(lambda *_: seen.extend(sent)),
        ]
        logits = model(ids, torch.arange(len(token_ids))[None], None, runtime_gather_output=True)[0].float().numpy()
        for hook in hooks:
            hook.remove()
    return logits, seen


def forward(
    path: Path, token_ids: list[int], own: AllReduceRecipe | RecipeBook | None, dtype: str = "float32"
) -> tuple[np.ndarray, list[Sent]]:
    """A model that follows recipes of its own."""
    model = build(path, getattr(torch, dtype)).eval()
    set_recipes(model, own)
    return _forward(model, token_ids)


def forward_in_autocast(
    path: Path, token_ids: list[int], own: AllReduceRecipe | None, enabled: bool, recipe: AllReduceRecipe | None
) -> tuple[np.ndarray, list[Sent]]:
    model = build(path).eval()
    set_recipes(model, own)
    with allreduce_autocast(enabled=enabled, recipe=recipe):
        return _forward(model, token_ids)


def sites(path: Path) -> list[str]:
    return set_recipes(build(path), None)


def _megatron_mlp() -> torch.nn.Module:
    """Megatron's own, of Megatron's own linears."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, add_bias_linear=True
    )
    torch.manual_seed(0)
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = MLP(config, parts, tp_group=groups().tp)
    torch.nn.init.ones_(mlp.linear_fc2.bias)
    return mlp


def plain_megatron_mlp(recipe: AllReduceRecipe | None) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Megatron's own MLP, its row-parallel linear swapped by one call: sites, output before and after, a gradient."""
    mlp = torch.nn.ModuleDict({"mlp": _megatron_mlp()})
    x = torch.randn(5, 1, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    before, bias = mlp["mlp"](x)
    sites = set_recipes(mlp, recipe)
    after, its_bias = mlp["mlp"](x)
    assert torch.equal(bias, its_bias)
    after.sum().backward()
    return sites, before.detach().numpy(), after.detach().numpy(), x.grad.numpy()


def refused_by_megatrons_mlp(book: RecipeBook) -> list[tuple[str, bool]]:
    """Class of Megatron's own linear, and whether it has a site, before a book that is refused and after."""
    mlp = torch.nn.ModuleDict({"mlp": _megatron_mlp()})
    found = []
    for _ in range(2):
        linear = mlp["mlp"].linear_fc2
        found.append((type(linear).__name__, hasattr(linear, "site")))
        with suppress(UserError):
            set_recipes(mlp, book)
    return found


def odd_linears() -> list[tuple[bool, bool]]:
    """Linears that a recipe must treat as Megatron does: of whole inputs, frozen with fused accumulation asked for.

    For each: whether the output with int8 is near the plain one, and whether backward gave the same gradient.
    """
    from megatron.core.tensor_parallel import RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    def build(**options) -> RowParallelLinear:
        torch.manual_seed(0)
        config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True)
        settings = {"input_is_parallel": True, "bias": True, "skip_bias_add": False, "is_expert": False}
        init = torch.nn.init.normal_
        linear = RowParallelLinear(32, 16, config=config, init_method=init, tp_group=groups().tp, **settings | options)
        torch.nn.init.constant_(linear.bias, 20.0)  # Megatron starts it at zero, where nobody would miss it
        return linear

    whole, frozen = build(input_is_parallel=False), build()
    frozen.weight.requires_grad_(False)
    frozen.gradient_accumulation_fusion = True
    found = []
    for linear in (whole, frozen):
        width = 32 if not linear.input_is_parallel else 32 // groups().tp.size()
        x = torch.randn(3, 1, width, generator=torch.Generator().manual_seed(1), requires_grad=True)
        outputs = []
        for recipe in (None, Int8BlockScaling(block_size=16)):
            model = torch.nn.ModuleDict({"linear": linear})
            set_recipes(model, recipe)
            x.grad = None
            with megatron_on_cpu():
                out, _ = linear(x)
                out.sum().backward()
            outputs.append((out.detach(), x.grad.clone()))
        (plain, gradient), (coded, its_gradient) = outputs
        near = 0 < float((coded - plain).norm()) < 0.02 * float(plain.norm())
        found.append((near, torch.equal(gradient, its_gradient)))
    return found


def experts_linear() -> tuple[list[str], bool]:
    """An expert's row-parallel linear is not reduced by itself: no site, and the same output."""
    from megatron.core.tensor_parallel import RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True)
    linear = RowParallelLinear(
        32,
        16,
        config=config,
        init_method=torch.nn.init.normal_,
        input_is_parallel=True,
        bias=False,
        skip_bias_add=True,
        is_expert=True,
        tp_group=groups().tp,
    )
    x = torch.randn(3, 1, 32 // groups().tp.size())
    before = linear(x)[0]
    sites = set_recipes(torch.nn.ModuleDict({"linear": linear}), Int8BlockScaling(), strict=False)
    return sites, torch.equal(before, linear(x)[0])


def parallel_block_sites(path: Path, token_ids: list[int]) -> tuple[list[str], list[Sent]]:
    """Falcon-H1's sites, and what its layers send when all are quantized."""
    model = build(path).eval()
    sites = set_recipes(model, Int8BlockScaling(block_size=16))
    return sites, _forward(model, token_ids)[1]


def cast_after_building(path: Path, token_ids: list[int]) -> np.ndarray:
    """A deferred norm's columns follow the dtype of the product, not that of construction."""
    model = build(path).eval().bfloat16()
    ids = torch.tensor([token_ids])
    with torch.no_grad(), megatron_on_cpu():
        return model(ids, torch.arange(len(token_ids))[None], None, runtime_gather_output=True)[0].float().numpy()


def error_of_set_recipes(path: Path, book: RecipeBook, strict: bool = True) -> str:
    """The one line that set_recipes raises; a book that is refused leaves the model as it was."""
    model = build(path)
    set_recipes(model, Int8BlockScaling())
    try:
        set_recipes(model, book, strict=strict)
    except UserError as error:
        linears = [m for m in model.modules() if isinstance(m, RecipeRowParallelLinear)]
        assert all(linear.recipes.recipe_for("x") == Int8BlockScaling() for linear in linears)
        return str(error)
    return ""


def backends_checked(book: RecipeBook) -> None:
    book.check_backends(groups().tp, torch.device("cpu"))


def error_of_loading(path: Path, book: RecipeBook | AllReduceRecipe) -> str:
    """That of LLM.from_pretrained, which reads no weights before it."""
    with mock.patch(
        "megatron_ssm_tp.inference.loading.load_parameters", side_effect=AssertionError("weights are read")
    ):
        try:
            LLM.from_pretrained(path, tp_allreduce=book)
        except UserError as error:
            return str(error)
    raise AssertionError("no error")


def sites_under_wrappers() -> list[list[str]]:
    """Of Megatron's own MLP bare, in Float16Module, and in DDP around that; and of a module whose name is module."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module, MegatronModule

    class Model(MegatronModule):
        def __init__(self) -> None:
            mlp = _megatron_mlp()
            super().__init__(mlp.config)
            self.module_list = torch.nn.ModuleDict({"module": mlp})

    def wrapped(model: Model, count: int) -> torch.nn.Module:
        model.config.bf16 = True
        model = Float16Module(model.config, model) if count else model
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        return DistributedDataParallel(model.config, ddp, model) if count > 1 else model

    with megatron_on_cpu():
        return [set_recipes(wrapped(Model(), count), Int8BlockScaling()) for count in range(3)]


class _Counter(RecipeBook):
    """int8 everywhere, and every question that it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def recipe_for(self, site: str) -> Int8BlockScaling:
        self.asked.append(site)
        return Int8BlockScaling(block_size=16)


def questions(path: Path, token_ids: list[int]) -> tuple[list[str], list[str]]:
    """The sites of a model, and those that its book is asked about in one forward pass."""
    model, counter = build(path).eval(), _Counter()
    sites = set_recipes(model, counter)
    _forward(model, token_ids)
    return sites, counter.asked


def training_step(
    path: Path, token_ids: list[int], recipe: AllReduceRecipe | None, **overrides
) -> tuple[dict[str, np.ndarray], set[str]]:
    """The loss and each parameter's gradient on this rank, and the names of parameters that every rank has whole."""
    model = build(path, **overrides).train()
    set_recipes(model, recipe)
    ids = torch.tensor([token_ids])
    with megatron_on_cpu():
        positions = torch.arange(ids.shape[1] - 1)[None]
        loss = model(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean()
        loss.backward()
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    whole = {n for n, p in model.named_parameters() if not getattr(p, "tensor_model_parallel", False)}
    return found | {"loss": loss.detach().numpy()}, whole


def fused_and_not(
    path: Path, prompts: list, n: int, recipe: AllReduceRecipe | None, dtype: str = "float32", hooked: bool = False
) -> tuple[dict[str, int], list, list]:
    """How many additions, and how many reductions with them, the stack left to the next norm; tokens and their
    log-probabilities with it and with every layer for itself. `hooked`: somebody looks at a layer."""
    from megatron_ssm_tp.layers import layer, stack

    calls = {"add_rms_norm": 0, "all_reduce_add_norm": 0}
    params = SamplingParams(temperature=0, num_tokens_to_generate=n, termination_id=-1, return_log_probs=True)

    def counted(name: str) -> mock.Mock:
        function = getattr(layer, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return mock.patch.object(layer, name, call)

    def answers() -> list[tuple[list[int], list[float]]]:
        model = LLM.from_pretrained(path, dtype=dtype, tp_allreduce=recipe)
        if hooked:
            next(m for m in model.model.modules() if isinstance(m, layer.MixerLayer)).register_forward_hook(print)
        return [(output.token_ids, output.logprobs) for output in model.generate(prompts, params)]

    with counted("add_rms_norm"), counted("all_reduce_add_norm"):
        with_it, found = answers(), dict(calls)
        with mock.patch.object(stack.SSMStack, "_fuses", lambda *_: False):
            without = answers()
    assert calls == found
    return found, with_it, without


def overlapped_and_whole(
    path: Path, prompts: list, n: int, recipe: AllReduceRecipe | None, dtype: str, max_tokens: int, way: str = HALVES
) -> tuple[int, list, list]:
    """How often sums travelled beside products; tokens and their log-probabilities then, and of plain passes."""
    from megatron_ssm_tp.inference.state import CacheLimits
    from megatron_ssm_tp.layers import stack
    from megatron_ssm_tp.layers.mamba1_mixer import Mamba1Mixer

    limits = CacheLimits(max_requests=4, max_tokens=max_tokens, max_sequence_length=256)
    params = SamplingParams(temperature=0, num_tokens_to_generate=n, termination_id=-1, return_log_probs=True)
    model = LLM.from_pretrained(path, dtype=dtype, tp_allreduce=recipe, limits=limits)
    owner, name = (stack, "forward_in_halves") if way == HALVES else (Mamba1Mixer, "_x_proj_beside_z")
    with mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name)) as passes:
        found = []
        for overlap_from in (2, None):
            set_overlap(model.model, way, overlap_from)
            outputs = model.generate(prompts, params)
            found.append([(output.token_ids, output.logprobs) for output in outputs])
            taken = passes.call_count
    return taken, *found


def error_of_overlap(path: Path, overlap_from: list, way: str = HALVES) -> str:
    """The one line of a model that this rank asks to overlap so."""
    try:
        LLM.from_pretrained(path, tp_overlap_from=overlap_from[groups().tp.rank()], tp_overlap=way)
    except UserError as error:
        return str(error)
    return ""
