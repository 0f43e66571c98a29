"""Row-parallel linears whose reduction follows a recipe, and their products taken apart: a rank's part, and the sum.

A site is a linear's module name, such as decoder.layers.3.mixer.out_proj. The recipe of its reduction is that of an
`allreduce_autocast` around the forward pass, or else of the book that `set_recipes` gave the model; without either it
is Megatron's own all-reduce, to the bit. Reduce-scatters of sequence parallelism are never quantized.
"""

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from torch import nn

from ..comm import mappings
from ..comm.autocast import recipe_of
from ..comm.recipe_book import RecipeBook, as_book
from ..comm.recipes import AllReduceRecipe


class RecipeRowParallelLinear(RowParallelLinear):
    """Megatron's RowParallelLinear, reduced by its site's recipe where there is one. `name` is the site."""

    recipes: RecipeBook | None = None
    reduced_elsewhere = False  # its product is part of another site's reduction

    def __init__(self, *args, name: str | None = None, **kwargs) -> None:
        super().__init__(*args, name=name, **kwargs)
        self.site = name or ""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """input_ [.., d/p] -> [.., h], and the bias where skip_bias_add is set."""
        if _recipe(self) is None:
            return super().forward(input_)
        if not self.input_is_parallel:
            input_ = scatter_to_tensor_model_parallel_region(input_, group=self.tp_group)
        out = reduce_partial(self, partial_product(self, input_))
        if self.skip_bias_add or self.bias is None:
            return out, self.bias if self.skip_bias_add else None
        return out + self.bias, None


def _recipe(linear: nn.Module) -> AllReduceRecipe | None:
    """The recipe that `linear`'s reduction follows now; None for linears of other makes (Transformer Engine's), and for
    those of experts, whose sums are not reduced by them."""
    if not isinstance(linear, RecipeRowParallelLinear) or linear.sequence_parallel or linear.tp_group.size() == 1:
        return None
    return None if linear.explicit_expert_comm else recipe_of(linear.site, linear.tp_group, linear.recipes)


def partial_product(linear: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
    """This rank's part of linear(x), bias left out: x [.., d/p] -> [.., h], to be summed over the ranks."""
    # Megatron's own choice of a product, by whether the weight is trained.
    return linear._forward_impl(
        input=x,
        weight=linear.weight,
        bias=None,
        gradient_accumulation_fusion=linear.gradient_accumulation_fusion,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=None,
        grad_output_buffer=None,
        gtp_remat_size=linear.gtp_remat_size,
    )


def reduce_partial(linear: RowParallelLinear, partial: torch.Tensor, exact_columns: int = 0) -> torch.Tensor:
    """The sum of a product of `linear`'s over the ranks: [l, b, h], or [l/p, b, h] under sequence parallelism.

    A recipe leaves the last `exact_columns` columns as they are.
    """
    if linear.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(partial, group=linear.tp_group)
    recipe = _recipe(linear)
    if recipe is None:
        return reduce_from_tensor_model_parallel_region(partial, group=linear.tp_group)
    return mappings.reduce_from_tensor_model_parallel_region(partial, linear.tp_group, recipe, exact_columns)


def set_recipes(model: nn.Module, recipes: AllReduceRecipe | RecipeBook | None) -> list[str]:
    """Have the row-parallel linears of `model`, any Megatron model, follow `recipes`; returns their sites, in order.

    Megatron's own RowParallelLinears become RecipeRowParallelLinears in place, their sites the names they have in
    `model`; nothing else about them changes. Left alone are those of experts, subclasses of others' making, and
    Transformer Engine's, which reduce by themselves.

    Raises:
        UserError: `recipes` is something else.
    """
    book, sites = as_book(recipes), []
    for name, linear in model.named_modules():
        if type(linear) is RowParallelLinear and not linear.explicit_expert_comm:
            linear.__class__, linear.site = RecipeRowParallelLinear, ""
        if isinstance(linear, RecipeRowParallelLinear):
            linear.site = linear.site or name.removeprefix("module.")  # where it was built without a name
            linear.recipes = book
            if not linear.reduced_elsewhere:
                sites.append(linear.site)
    return sites
