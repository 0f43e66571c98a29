"""Row-parallel linears whose reduction follows a recipe, and their products taken apart: a rank's part, and the sum.

A site is a linear's module name, such as decoder.layers.3.mixer.out_proj. The recipe of its reduction is that of an
`allreduce_autocast` around the forward pass, or else of the book that `set_recipes` gave the model; without either it
is Megatron's own all-reduce, to the bit. Reduce-scatters of sequence parallelism are never quantized.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import _reduce as all_reduce_in_place
from megatron.core.tensor_parallel.mappings import (
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from torch import nn

from ..comm import mappings
from ..comm.autocast import recipe_of
from ..comm.exchange import linear_all_reduce
from ..comm.recipe_book import RecipeBook, as_book
from ..comm.recipes import AllReduceRecipe
from ..errors import UserError
from ..ops.few_rows import few_rows_linear, few_rows_parts
from .lean_linear import is_lean


class RecipeRowParallelLinear(RowParallelLinear):
    """Megatron's RowParallelLinear, reduced by its site's recipe where there is one. `name` is the site."""

    recipes: RecipeBook | None = None
    reduced_elsewhere = False  # its product is part of another site's reduction
    left_partial = False  # see unreduced()

    def __init__(self, *args, name: str | None = None, **kwargs) -> None:
        super().__init__(*args, name=name, **kwargs)
        self.site = name or ""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return (
            few_rows_linear(input, weight) if is_lean(self) else super()._forward_impl(input, weight, *args, **kwargs)
        )

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """input_ [.., d/p] -> [.., h], and the bias where skip_bias_add is set; see unreduced()."""
        if self.left_partial and has_parts(self):
            return few_rows_parts(input_, self.weight), None
        recipe = recipe_now(self)
        if recipe is None and not (self.input_is_parallel and is_lean(self)):
            return super().forward(input_)
        if not self.input_is_parallel:
            input_ = scatter_to_tensor_model_parallel_region(input_, group=self.tp_group)
        if recipe is None:
            out = all_reduce_in_place(partial_product(self, input_), self.tp_group)
        elif self.left_partial:
            parts = few_rows_parts(input_, self.weight) if is_lean(self) else partial_product(self, input_)[None]
            return parts, self.bias
        elif is_lean(self):
            out = linear_all_reduce(input_, self.weight, self.tp_group, recipe)
        else:
            partial = partial_product(self, input_)
            out = mappings.reduce_from_tensor_model_parallel_region(partial, self.tp_group, recipe)
        if self.skip_bias_add or self.bias is None:
            return out, self.bias if self.skip_bias_add else None
        return out + self.bias, None


def recipe_now(linear: nn.Module | None) -> AllReduceRecipe | None:
    """The recipe that `linear`'s reduction follows now; None for linears of other makes (Transformer Engine's: see
    te_row_parallel.py), and for those of experts, whose sums are not reduced by them."""
    if not isinstance(linear, RecipeRowParallelLinear) or linear.sequence_parallel or linear.tp_group.size() == 1:
        return None
    return None if linear.explicit_expert_comm else recipe_of(linear.site, linear.tp_group, linear.recipes)


def has_parts(linear: nn.Module | None) -> bool:
    """Whether `linear` can leave its product in parts: one rank has it all, and adds no bias."""
    ours = isinstance(linear, RecipeRowParallelLinear) and linear.bias is None
    return ours and linear.tp_group.size() == 1 and is_lean(linear)


def product_in_parts(linear: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
    """linear(x), bias left out, as parts [P, .., h] to be added (few_rows.few_rows_parts): one, where ranks are summed
    over."""
    return few_rows_parts(x, linear.weight) if has_parts(linear) else linear(x)[0][None]


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
    recipe = recipe_now(linear)
    if recipe is not None and linear.left_partial:
        return partial
    return mappings.reduce_from_tensor_model_parallel_region(partial, linear.tp_group, recipe, exact_columns)


@contextmanager
def unreduced(linear: RecipeRowParallelLinear) -> Iterator[None]:
    """Within, the products of `linear` that a recipe would reduce are left to the caller to sum, bias unadded, as parts
    [P, .., h]; so are those of one rank's, see has_parts()."""
    linear.left_partial = True
    try:
        yield
    finally:
        linear.left_partial = False


def set_recipes(
    model: nn.Module, recipes: AllReduceRecipe | RecipeBook | str | None, *, strict: bool = True
) -> list[str]:
    """Have the row-parallel linears of `model`, any Megatron model, follow `recipes`; returns their sites, in order.

    Megatron's RowParallelLinears and TERowParallelLinears become RecipeRowParallelLinears and
    RecipeTERowParallelLinears in place; nothing else about them changes. Left alone are those of experts, subclasses
    of others' making, and what else of Transformer Engine's reduces by itself (its own layers, fused operations).

    A site is the linear's name in the model that it is first seen in, without the "module." of each wrapper (DDP,
    Float16Module). Layers are counted as modules are: from 0, and in every pipeline stage anew, as in the names that
    Megatron gives its own RecipeConfig. Megatron-FSDP knows classes by name: wrap in it first.

    Args:
        model: a whole model, wrapped or not, or one stage or chunk of it.
        recipes: one for all sites but x_proj's, or a book; None and "none" are Megatron's own all-reduce, but for the
            engine of this package None leaves the choice to it (inference/small_sums.py).
        strict: hold a book's matchers against the sites, see RecipeBook.check_sites. Of stages that differ give False,
            and check the sites of all of them, or some ranks raise what others do not.

    Raises:
        UserError: `model` or `recipes` is something else, or `strict` and a matcher decides no site, or there are
            recipes and no site at all; nothing is set then. The same on all tensor-parallel ranks, whose sites are the
            same.
    """
    if not isinstance(model, nn.Module):
        raise UserError("model", model, "no model", "a torch.nn.Module")
    book, found = as_book(recipes, "recipes"), []
    for name, linear in model.named_modules():
        kind = _kind(linear)
        if kind is not None:
            built_as = linear.site if type(linear) is kind else ""
            found.append((linear, kind, built_as or re.sub(r"^(module\.)+", "", name)))
    sites = [site for linear, _, site in found if not getattr(linear, "reduced_elsewhere", False)]
    if book is not None and strict:
        _check_that_there_are(sites, model)
        book.check_sites(sites)
    for linear, kind, site in found:
        linear.__class__, linear.site, linear.recipes = kind, site, book
    return sites


def _check_that_there_are(sites: list[str], model: nn.Module) -> None:
    if not sites:
        legal = "a Megatron model, or one stage of it with strict=False"
        raise UserError("model", type(model).__name__, "has no row-parallel linear that could follow recipes", legal)


def _kind(linear: nn.Module) -> type[nn.Module] | None:
    """The class of ours that serves `linear`, if any."""
    if isinstance(linear, RecipeRowParallelLinear):
        return type(linear)
    if type(linear) is RowParallelLinear:
        return None if linear.explicit_expert_comm else RecipeRowParallelLinear
    extension = sys.modules.get("megatron.core.extensions.transformer_engine")
    # Without TE that module's classes are mocks, not types.
    if extension is None or not extension.HAVE_TE or not isinstance(linear, extension.TERowParallelLinear):
        return None
    from .te_row_parallel import RecipeTERowParallelLinear

    known = type(linear) in (extension.TERowParallelLinear, RecipeTERowParallelLinear)
    return RecipeTERowParallelLinear if known and linear.parallel_mode == "row" else None  # experts' mode is None
