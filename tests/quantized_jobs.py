"""What ranks are asked to do with a whole model whose reductions follow recipes."""

from pathlib import Path

import numpy as np
import torch
from collective_jobs import Sent, collectives_recorded
from jobs import build, groups

from megatron_ssm_tp import allreduce_autocast
from megatron_ssm_tp.comm.recipe_book import RecipeBook, as_book
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
        logits = model(ids, torch.arange(len(token_ids))[None], None, runtime_gather_output=True)[0].numpy()
        for hook in hooks:
            hook.remove()
    return logits, seen


def forward(
    path: Path, token_ids: list[int], own: AllReduceRecipe | RecipeBook | None, dtype: str = "float32"
) -> tuple[np.ndarray, list[Sent]]:
    """A model that follows recipes of its own."""
    model = build(path, getattr(torch, dtype)).eval()
    set_recipes(model, as_book(own))
    return _forward(model, token_ids)


def forward_in_autocast(
    path: Path, token_ids: list[int], own: AllReduceRecipe | None, enabled: bool, recipe: AllReduceRecipe | None
) -> tuple[np.ndarray, list[Sent]]:
    model = build(path).eval()
    set_recipes(model, as_book(own))
    with allreduce_autocast(enabled=enabled, recipe=recipe):
        return _forward(model, token_ids)


def sites(path: Path) -> list[str]:
    return set_recipes(build(path), None)
