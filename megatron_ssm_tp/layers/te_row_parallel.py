"""Transformer Engine's row-parallel linear, reduced by a recipe. Imported only where Megatron has found TE.

te.pytorch.Linear all-reduces in its forward where parallel_mode is "row" and tp_size is above 1, and adds the bias
after that itself (gemm_bias_unfused_add) unless it is to return it. For a forward under a recipe the linear is told
that it is alone and has no bias to add, and what TE then leaves out is done here. Nothing of TE is replaced: products,
quantized or not, gradients, weights, metadata and checkpoints stay its own. In the backward pass of a row-parallel
linear there is nothing to reduce, and TE asks for no tp_size in it.

Written to the sources of TE 1.13 to 2.18, whose forward reads these attributes of the linear at each call (before,
amaxes of fp8 were reduced by tp_size too). It has not been run with TE. TE's debugging tools see one rank's statistics
of such a forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.extensions.transformer_engine import TERowParallelLinear

from ..comm import mappings
from ..comm.autocast import recipe_of
from ..comm.recipe_book import RecipeBook
from ..comm.recipes import AllReduceRecipe

_ALONE = {"tp_size": 1, "apply_bias": False, "gemm_bias_unfused_add": False}


class RecipeTERowParallelLinear(TERowParallelLinear):
    """Megatron's TERowParallelLinear, reduced by its site's recipe where there is one; else TE reduces."""

    recipes: RecipeBook | None = None
    reduced_elsewhere = False
    site = ""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [.., d/p] -> [.., h], and the bias where skip_bias_add is set.

        What the recipe leaves alone (min_bytes, dtypes) Megatron reduces, whatever symmetric_ar_type says.
        """
        recipe = self._recipe()
        if recipe is None:
            return super().forward(x)
        adds_bias = self.apply_bias
        with _alone(self):
            partial, bias = super().forward(x)
        out = mappings.reduce_from_tensor_model_parallel_region(partial, self.tp_group, recipe)
        return out + self.bias.to(out.dtype) if adds_bias else out, bias

    def _recipe(self) -> AllReduceRecipe | None:
        if self.sequence_parallel or self.tp_size == 1:
            return None
        return recipe_of(self.site, self.tp_group, self.recipes)


@contextmanager
def _alone(linear: TERowParallelLinear) -> Iterator[None]:
    """Within, TE computes this rank's part of the product and nothing more; of one thread at a time, as TE itself."""
    own = {name: getattr(linear, name) for name in _ALONE}
    vars(linear).update(_ALONE)
    try:
        yield
    finally:
        vars(linear).update(own)
