"""A checkpoint directory as lazy tensors: config.json beside safetensors or pytorch_model.bin, whole or in shards.

Opening reads headers only. `Checkpoint.read` brings in the asked part of one tensor; nothing is kept.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError

_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class _TensorFile(Protocol):
    """One open file of tensors."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor: ...


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError("file", str(path), f"cannot be read ({error})", "a whole safetensors file") from error

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        stored = self._file.get_slice(name).get_dtype()
        return _DTYPE_NAMES.get(stored, stored)

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        # The format has no strides: read the covering range, then stride over it.
        covering = tuple(slice(part.start, part.stop) for part in index)
        steps = tuple(slice(None, None, part.step) for part in index)
        return self._file.get_slice(name)[covering][steps]


class _TorchFile:
    """A zip-format torch.save file, memory-mapped: a tensor's bytes are touched when it is read."""

    def __init__(self, path: Path) -> None:
        try:
            self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises a dozen kinds here, all of them about this file
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            legal = "a whole file written by torch.save in its zip format (torch >= 1.6)"
            raise UserError("file", str(path), f"cannot be read ({reason})", legal) from error

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        return self._tensors[name][index]


def _open_file(path: Path) -> _TensorFile:
    if not path.is_file():
        raise UserError("file", str(path), "is named by the index but missing", "every shard beside its index")
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError("file", str(path), f"cannot be read ({error})", "a JSON file") from error
    if not isinstance(content, dict):
        raise UserError("file", str(path), "is not a JSON object", "a JSON object")
    return content


class Checkpoint:
    """A directory of weights. Tensors are known by the names in the files.

    Raises (on opening):
        UserError: no such directory, no config.json, no weight files, or a file that is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, (str, Path)):
            raise UserError("path", path, "is not a path", "a directory with config.json and weights")
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError("path", str(path), "is not a directory", "a directory with config.json and weights")
        if not (self.path / "config.json").is_file():
            raise UserError("path", str(path), "has no config.json", "a directory with config.json and weights")
        self.raw_config = _read_json(self.path / "config.json") | self._generation_ids()
        self._files = self._open()

    def _generation_ids(self) -> dict[str, Any]:
        """eos_token_id of generation_config.json, which wins over config.json's where text is generated, as in HF."""
        file = self.path / "generation_config.json"
        eos = _read_json(file).get("eos_token_id") if file.is_file() else None
        return {} if eos is None else {"eos_token_id": eos}

    def _open(self) -> dict[str, _TensorFile]:
        """name -> the file that holds it."""
        found = next((name for name in _WEIGHT_FILES if (self.path / name).is_file()), None)
        if found is None:
            raise UserError("path", str(self.path), "has no weights", " or ".join(_WEIGHT_FILES))
        if not found.endswith(".index.json"):
            file = _open_file(self.path / found)
            return dict.fromkeys(file.names(), file)
        weight_map = _read_json(self.path / found).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
            legal = "an index with a weight_map of tensor to file name"
            raise UserError("file", str(self.path / found), "has no weight_map", legal)
        files = {name: _open_file(self.path / name) for name in sorted(set(weight_map.values()))}
        return {tensor: file for file in files.values() for tensor in file.names()} | {
            tensor: files[name] for tensor, name in weight_map.items() if tensor in files[name].names()
        }

    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> str:
        return self._files[name].dtype(name)

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """The part of tensor `name` at `index` (one slice with bounds and step for each axis), in the stored dtype."""
        return self._files[name].read(name, index)
