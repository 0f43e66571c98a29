"""What ranks are asked to do with a whole model whose reductions follow recipes."""

from pathlib import Path

import numpy as np
import torch
from collective_jobs import Sent, collectives_recorded
from jobs import build, groups

from megatron_ssm_tp import allreduce_autocast
from megatron_ssm_tp.comm.recipe_book import RecipeBook
from megatron_ssm_tp.comm.recipes import AllReduceRecipe
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
