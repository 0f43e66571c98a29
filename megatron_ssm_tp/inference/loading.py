"""From what LLM.from_pretrained is asked for to a model with its weights, alike on all ranks."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from ..checkpoint.loader import ModelCheckpoint, load_parameters, open_model
from ..comm.recipe_book import RecipeBook, as_book
from ..comm.recipe_file import FILE
from ..comm.recipes import AllReduceRecipe
from ..config import DTYPES
from ..errors import UserError, renamed
from ..layers.model import SSMModel, build_model
from ..layers.overlap import check_overlap, set_overlap
from ..layers.row_parallel import set_recipes
from ..ops.choose import implementation
from ..partition.layout import check_tp_size
from ..ranks import agree, check_all_same
from .engines import pick_engine
from .requests import check_seed
from .running import Bursts
from .state import CacheLimits
from .tokenizer import NoTokenizer, TextTokenizer, load_tokenizer


class Files(NamedTuple):
    """What is read before the weights, and of what dtype these will be."""

    checkpoint: ModelCheckpoint
    dtype: torch.dtype
    tokenizer: TextTokenizer | NoTokenizer
    recipes: RecipeBook | None


@dataclass(frozen=True)
class Asked:
    """Arguments of LLM.from_pretrained, which every rank gives alike."""

    dtype: str | torch.dtype
    limits: CacheLimits
    seed: int
    exact_norm: bool
    ops: str
    tp_allreduce: AllReduceRecipe | RecipeBook | str | None
    tp_overlap_from: int | None
    tp_overlap: str
    engine: str
    bursts: Bursts | None

    def files(self, path: str | Path, tokenizer: str | Path | None, groups: ProcessGroupCollection) -> Files:
        """A checkpoint's headers and tokenizer, everything checked; where nodes differ, no rank goes on.

        Raises:
            UserError: anything wrong with arguments or files; the same on every rank.
        """
        found = agree(lambda: self._read(path, tokenizer, groups.tp.size()), groups.tp)
        told = {field.name: str(getattr(self, field.name)) for field in fields(self)}
        told |= {"dtype": str(found.dtype), "tp_allreduce": found.recipes.fingerprint() if found.recipes else ""}
        check_all_same({"path": str(found.checkpoint.config), **told}, groups.tp)
        return found

    def _read(self, path: str | Path, tokenizer: str | Path | None, tp: int) -> Files:
        if not isinstance(self.limits, CacheLimits):
            raise UserError("limits", self.limits, "is not one", "CacheLimits(max_requests=..., ...)")
        if self.bursts is not None and not isinstance(self.bursts, Bursts):
            raise UserError("bursts", self.bursts, "is not one", "Bursts(longest=..., ...), or None")
        check_seed(self.seed)
        implementation(self.ops)
        checkpoint = open_model(path)
        check_tp_size(checkpoint.config, tp)
        pick_engine(self.engine, checkpoint.config, self.limits.prefix_bytes)
        check_overlap(checkpoint.config, self.tp_overlap, self.tp_overlap_from)
        words = load_tokenizer(Path(tokenizer or path), checkpoint.config)
        return Files(checkpoint, self._dtype(checkpoint), words, as_book(self.tp_allreduce, "tp_allreduce"))

    def _dtype(self, checkpoint: ModelCheckpoint) -> torch.dtype:
        name = str(self.dtype).removeprefix("torch.")
        if name == "auto":
            name = checkpoint.config.dtype
        if name not in DTYPES:
            raise UserError("dtype", name, "cannot be run", ", ".join(("auto", *DTYPES)))
        return getattr(torch, name)

    def model(self, files: Files, groups: ProcessGroupCollection, device: torch.device) -> SSMModel:
        """This rank's share, on `device`.

        Raises:
            UserError: the recipes cannot be carried here, or are of another model; the same on every rank.
        """
        if files.recipes is not None:
            with renamed(lambda field: field if field == FILE else f"tp_allreduce.{field}"):
                files.recipes.check_backends(groups.tp, device)
        length, config = self.limits.max_sequence_length, files.checkpoint.config
        model = build_model(config, groups, files.dtype, device, length, self.seed, self.exact_norm, self.ops)
        set_overlap(model, self.tp_overlap, self.tp_overlap_from)
        set_recipes(model, files.recipes)  # before the weights: a book for another model is refused at once
        rank, ranks = groups.tp.rank(), groups.tp.size()
        load_parameters(dict(model.named_parameters()), files.checkpoint, rank, ranks, bar=rank == 0)
        return model.eval()
