"""How a tensor-parallel all-reduce travels: a recipe names the format of its codes, their blocks, and who carries them.

none    Megatron's own all-reduce (no recipe: None)
bf16    Bf16                 2 bytes a value
int8    Int8BlockScaling     1 byte a value and 4 a block
fp8     Float8BlockScaling   1 byte a value (e4m3) and 4 a block
int4    Int4BlockScaling     half a byte a value and 4 a block
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ..errors import UserError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("auto", "symmetric", "collective")
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class AllReduceRecipe:
    """What the formats share; use one of its subclasses.

    Args:
        block_size: values that share a scale.
        min_bytes: a tensor of fewer bytes is not quantized.
        backend: "symmetric" needs GPUs of one node, "collective" works in any process group; "auto" takes the first
            of them that can.

    Raises:
        UserError: a field is not legal.
    """

    block_size: int = 128
    min_bytes: int = 0
    backend: str = "auto"

    name: ClassVar[str]
    code_bits: ClassVar[int]
    scale_bytes: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if type(self) is AllReduceRecipe:
            raise TypeError("AllReduceRecipe is the base of Bf16, Int8BlockScaling and the others: use one of them")
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise UserError("block_size", self.block_size, "no size of a block", ", ".join(map(str, BLOCK_SIZES)))
        if type(self.min_bytes) is not int or self.min_bytes < 0:
            raise UserError("min_bytes", self.min_bytes, "no count of bytes", "integers from 0")
        if self.backend not in BACKENDS:
            raise UserError("backend", self.backend, "unknown", ", ".join(BACKENDS))

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's codes."""
        return self.block_size * self.code_bits // 8

    def bytes_of(self, values: int) -> int:
        """Bytes of codes and scales that stand for `values` numbers; the last block counts whole."""
        return -(-values // self.block_size) * (self.block_bytes + self.scale_bytes)

    def supports(self, dtype: torch.dtype, group: object) -> tuple[bool, str]:
        """Whether tensors of `dtype` can be reduced over `group` by this recipe, and if not, why."""
        if dtype not in DTYPES:
            return False, f"dtype {_name(dtype)} is none of {legal_dtypes()}"
        if not isinstance(group, dist.ProcessGroup):
            return False, f"group {group!r} is no process group that this rank belongs to"
        return True, ""

    def check(self, x: torch.Tensor, group: object, exact_columns: int = 0) -> None:
        """Raises UserError, the same on every rank, unless x [.., h] can be reduced over `group` with so many of its
        last columns as they are."""
        if x.dtype not in DTYPES:
            raise UserError("dtype", x.dtype, "cannot be reduced by a recipe", legal_dtypes())
        ok, reason = self.supports(x.dtype, group)
        if not ok:
            raise UserError("group", group, reason, "a torch.distributed.ProcessGroup that this rank belongs to")
        columns = x.shape[-1] if x.dim() else 1
        if not 0 <= exact_columns < max(columns, 1):
            raise UserError("exact_columns", exact_columns, f"x has {columns} columns", f"0 to {max(columns - 1, 0)}")

    def as_config(self) -> dict[str, Any]:
        """The payload under `configs:` of a recipe file that gives this recipe."""
        return {"recipe": self.name} | {field: getattr(self, field) for field in FIELDS}


@dataclass(frozen=True)
class Bf16(AllReduceRecipe):
    """No quantization: values travel as bfloat16, are summed in float32 in rank order, and only the sum is rounded.

    Blocks are only the unit in which a tensor is cut. Tensors of other dtypes are rounded to bfloat16 first: float32
    above 3.39e38 becomes Inf by it, and so does float16 from 65408 on.
    """

    name: ClassVar[str] = "bf16"
    code_bits: ClassVar[int] = 16
    scale_bytes: ClassVar[int] = 0


@dataclass(frozen=True)
class Int8BlockScaling(AllReduceRecipe):
    """Codes -127 .. 127 times a float32 scale a block: off by at most 1/254 of the block's largest magnitude."""

    name: ClassVar[str] = "int8"
    code_bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Float8BlockScaling(AllReduceRecipe):
    """e4m3 codes times a float32 scale a block: off by at most 1/16 of each value, or 2^-10/448 of the block's largest
    magnitude where that is more. Better than int8 where few values of a block are large."""

    name: ClassVar[str] = "fp8"
    code_bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Int4BlockScaling(AllReduceRecipe):
    """Codes -7 .. 7, two a byte, times a float32 scale a block: off by at most 1/14 of the block's largest magnitude.
    For slow links."""

    name: ClassVar[str] = "int4"
    code_bits: ClassVar[int] = 4


FIELDS = ("block_size", "min_bytes", "backend")
_BY_NAME = {kind.name: kind for kind in (Bf16, Int8BlockScaling, Float8BlockScaling, Int4BlockScaling)}
NONE = "none"  # Megatron's own all-reduce, where it is asked for by name
RECIPE_NAMES = (NONE, *_BY_NAME)


def recipe_by_name(name: str, **fields: Any) -> AllReduceRecipe | None:
    """The recipe that a command line or a file calls `name`, with these fields; None for "none".

    Raises:
        UserError: unknown name or field, or a field's value is not legal.
    """
    if name not in RECIPE_NAMES:
        raise UserError("recipe", name, "unknown format", ", ".join(RECIPE_NAMES))
    for field in fields:
        if field not in FIELDS:
            raise UserError("recipe", field, f"no field of {name}", ", ".join(FIELDS))
    return _BY_NAME[name](**fields) if name != NONE else None


def legal_dtypes() -> str:
    return ", ".join(_name(dtype) for dtype in DTYPES)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
