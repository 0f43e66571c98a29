"""How ranks' sums travel in steps and in passes that are graphs: as is asked for, or by kernels that do not wait for
NCCL."""

import torch
import torch.distributed as dist

from ..comm import symmetric
from ..comm.autocast import book_of, is_decided
from ..comm.recipe_book import RecipeBook
from ..comm.recipes import recipe_by_name
from ..layers.model import SSMModel
from ..layers.row_parallel import RecipeRowParallelLinear


class SmallSums:
    """Recipes of the sums of a model's decoding steps and of passes that are graphs. Made by all ranks together."""

    def __init__(self, model: SSMModel, device: torch.device) -> None:
        self._group = model.pg_collection.tp
        self._linears = [module for module in model.modules() if isinstance(module, RecipeRowParallelLinear)]
        self._unasked = _low_latency_book(model.config.params_dtype, self._group, device)

    def book(self) -> RecipeBook | None:
        """As an allreduce_autocast or the model's recipes say now, or as suits such passes."""
        own = self._own()
        return book_of(self._group, own) if self._is_asked(own) else self._unasked

    def asked(self) -> str:
        """What an allreduce_autocast or the model's recipes say now, in letters: states that were made when these were
        others differ."""
        if self._group.size() == 1:
            return ""
        own = self._own()
        book = book_of(self._group, own)
        return f"{self._is_asked(own)} {book.fingerprint() if book else ''}"

    def _own(self) -> RecipeBook | None:
        return next((linear.recipes for linear in self._linears if linear.recipes is not None), None)

    def _is_asked(self, own: RecipeBook | None) -> bool:
        return own is not None or is_decided(self._group)


def _low_latency_book(dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device) -> RecipeBook | None:
    """16-bit sums by kernels of ours in the place of NCCL's, x_proj's too: made in float32 and rounded once.

    In a graph NCCL's would go to a stream of its own and back, twice a layer, and take the host longer to launch than
    the step lasts. None: values are not of 16 bits, or peers' memory cannot be written here. A collective call.
    """
    recipe = recipe_by_name("bf16")
    if device.type != "cuda" or group.size() == 1 or dtype != torch.bfloat16:
        return None
    if not symmetric.supports(torch.empty(0, dtype=dtype, device=device), group, recipe)[0]:
        return None
    matchers = {
        name: {"type": "glob", "pattern": pattern, "config": "all", "enabled": True}
        for name, pattern in (("x_proj", "*.x_proj"), ("others", "*"))
    }
    return RecipeBook.from_config_dict({"configs": {"all": {"recipe": "bf16"}}, "matchers": matchers})
