"""allreduce_autocast: quantized tensor-parallel all-reduces for what runs inside a `with`.

Source of the idea: transformer_engine.pytorch.autocast, which saves and restores in the same way. Ours keeps its state
in a context variable: threads and asyncio tasks do not see each other's. A thread started inside the `with` starts
without it, and so does autograd's own thread when it recomputes activations: there, give sites recipes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch.distributed as dist

from ..errors import UserError
from .recipe_book import RecipeBook, as_book
from .recipes import AllReduceRecipe, Int8BlockScaling


class _Setting(NamedTuple):
    book: RecipeBook | None  # None: off
    group: dist.ProcessGroup | None  # None: any


_settings: ContextVar[tuple[_Setting, ...]] = ContextVar("allreduce_autocast", default=())


@contextmanager
def allreduce_autocast(
    enabled: bool = True,
    recipe: AllReduceRecipe | RecipeBook | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[None]:
    """Within the context, row-parallel reductions follow `recipe` whatever recipe their layer was built with.

    Contexts nest: for each group the innermost one that applies to it decides. The state before is restored on the way
    out, also of an exception. All ranks of a group must enter alike.

    Args:
        enabled: False turns quantization off within.
        recipe: for all sites but x_proj's, or a book of recipes by site; Int8BlockScaling() if nothing is given; "none"
            is as `enabled=False`. No model is known here, so that a book's matchers that fit none of its sites are not
            found out as by `set_recipes`.
        group: only reductions over this process group; all groups if none is given.

    Raises:
        UserError: an argument is something else.
    """
    if not isinstance(enabled, bool):
        raise UserError("enabled", enabled, "no yes or no", "True, False")
    recipe = as_book(Int8BlockScaling() if recipe is None else recipe)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise UserError("group", group, "no process group of this rank", "a torch.distributed.ProcessGroup, None")
    token = _settings.set((*_settings.get(), _Setting(recipe if enabled else None, group)))
    try:
        yield
    finally:
        _settings.reset(token)


def is_decided(group: dist.ProcessGroup) -> bool:
    """Whether an allreduce_autocast decides now how reductions over `group` travel, be it that it turns recipes off."""
    return _setting_of(group) is not None


def recipe_of(site: str, group: dist.ProcessGroup, own: RecipeBook | None = None) -> AllReduceRecipe | None:
    """The recipe of the reduction at `site` over `group` now: a context's, or else that of the model's `own` book.

    Returns:
        None: Megatron's own all-reduce.
    """
    book = book_of(group, own)
    return None if book is None else book.recipe_for(site)


def book_of(group: dist.ProcessGroup, own: RecipeBook | None = None) -> RecipeBook | None:
    """The book that `recipe_of` looks into."""
    setting = _setting_of(group)
    return own if setting is None else setting.book


def _setting_of(group: dist.ProcessGroup) -> _Setting | None:
    """Of the innermost context that applies to `group`."""
    return next((s for s in reversed(_settings.get()) if s.group is None or s.group == group), None)
