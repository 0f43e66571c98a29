"""Tensor-parallel all-reduces with 16, 8 or 4 bits on the wire: recipes, who uses which, codecs, and the reductions."""

from .autocast import allreduce_autocast, recipe_of
from .mappings import reduce_from_tensor_model_parallel_region
from .recipe_book import RecipeBook
from .recipes import (
    AllReduceRecipe,
    Bf16,
    Float8BlockScaling,
    Int4BlockScaling,
    Int8BlockScaling,
    recipe_by_name,
)

__all__ = [
    "AllReduceRecipe",
    "Bf16",
    "Int8BlockScaling",
    "Float8BlockScaling",
    "Int4BlockScaling",
    "recipe_by_name",
    "RecipeBook",
    "allreduce_autocast",
    "recipe_of",
    "reduce_from_tensor_model_parallel_region",
]
