"""What ranks are asked to do with a whole model whose reductions follow recipes."""

from pathlib import Path

import numpy as np
import torch
from collective_jobs import Sent, collectives_recorded
from jobs import build, groups

from megatron_ssm_tp import allreduce_autocast
from megatron_ssm_tp.comm.recipe_book import RecipeBook
from megatron_ssm_tp.comm.recipes import AllReduceRecipe, Int8BlockScaling
from megatron_ssm_tp.compat.cpu import megatron_on_cpu
from megatron_ssm_tp.layers.model import SSMModel
from megatron_ssm_tp.layers.row_parallel import set_recipes


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


def plain_megatron_mlp(recipe: AllReduceRecipe | None) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Megatron's own MLP, its row-parallel linear swapped by one call: sites, output before and after, a gradient."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, add_bias_linear=True
    )
    torch.manual_seed(0)
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = torch.nn.ModuleDict({"mlp": MLP(config, parts, tp_group=groups().tp)})
    x = torch.randn(5, 1, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    before, _ = mlp["mlp"](x)
    sites = set_recipes(mlp, recipe)
    after, _ = mlp["mlp"](x)
    after.sum().backward()
    return sites, before.detach().numpy(), after.detach().numpy(), x.grad.numpy()


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
        return RowParallelLinear(32, 16, config=config, init_method=init, tp_group=groups().tp, **settings | options)

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
    sites = set_recipes(torch.nn.ModuleDict({"linear": linear}), Int8BlockScaling())
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
