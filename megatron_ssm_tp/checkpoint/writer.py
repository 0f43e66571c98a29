"""Megatron distributed checkpoints (`torch_dist`): saved at one TP size, loaded at any other."""

import dataclasses
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection

from ..compat.cpu import megatron_on_cpu
from ..config import ModelConfig
from ..errors import UserError
from ..ranks import agree

_PREFIX = "model."
_CONFIG = "model_config"


def _sharded(model: LanguageModule, groups: ProcessGroupCollection) -> dict:
    return model.sharded_state_dict(prefix=_PREFIX, metadata={"dp_cp_group": groups.dp_cp})


def save_torch_dist(
    path: str | Path, model: LanguageModule, config: ModelConfig, groups: ProcessGroupCollection
) -> None:
    """Write the model, on all ranks together. Until it is whole it has another name, `<path>.partial`.

    A program that calls this needs `if __name__ == "__main__"`: Megatron spawns a helper process that imports it.

    Raises:
        UserError: `path` exists or cannot be written; the same on every rank.
    """
    path = Path(path).absolute()
    partial = path.with_name(f"{path.name}.partial")
    agree(lambda: _make_room(path, partial), dist.group.WORLD)
    with megatron_on_cpu():
        dist_checkpointing.save(_sharded(model, groups) | {_CONFIG: dataclasses.asdict(config)}, str(partial))
    dist.barrier()
    agree(lambda: partial.rename(path) if dist.get_rank() == 0 else None, dist.group.WORLD)


def _make_room(path: Path, partial: Path) -> None:
    """Rank 0 alone decides and acts: another node may see the file system late."""
    if dist.get_rank() != 0:
        return
    try:
        if path.exists():
            raise UserError("save", str(path), "exists", "a path that does not")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError("save", str(path), f"cannot be written ({error})", "a path in a folder that can be") from error


def _check_stored(path: str | Path, config: ModelConfig) -> None:
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise UserError("load", str(path), "is not a torch_dist checkpoint", "a directory that save_torch_dist wrote")
    if dist_checkpointing.load_common_state_dict(str(path)).get(_CONFIG) != dataclasses.asdict(config):
        raise UserError("load", str(path), "is of another model", f"a checkpoint of {config}")


def load_torch_dist(
    path: str | Path, model: LanguageModule, config: ModelConfig, groups: ProcessGroupCollection
) -> None:
    """Fill the model from a directory that save_torch_dist wrote at any TP size.

    Raises:
        UserError: not such a directory, or one of another model.
    """
    agree(lambda: _check_stored(path, config), dist.group.WORLD)
    with megatron_on_cpu():
        state = dist_checkpointing.load(_sharded(model, groups), str(path))
    model.load_state_dict({name.removeprefix(_PREFIX): value for name, value in state.items() if name != _CONFIG})
