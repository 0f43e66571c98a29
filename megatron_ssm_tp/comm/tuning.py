"""Which kernel of the symmetric backend reduces how much, and how it is launched: a measured table.

tools/tune_allreduce.py measures and writes symmetric_tuning.json. For numbers of ranks that nobody measured, and in
between, `guess` says what the bytes suggest.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from .recipes import AllReduceRecipe

TABLE = Path(__file__).parent / "symmetric_tuning.json"


@dataclass(frozen=True)
class Launch:
    """How a kernel of symmetric_triton.py is launched.

    Args:
        way: "words" (one-shot; codes carry their own arrival), "one-shot" (a flag a tile), "split" (one-shot, by
            programs that send and programs that receive) or "two-shot" (by programs that send, sum and receive).
        tile: values a program holds at a time, at least a block; of a fused reduction, a row whatever this says.
        warps: of a program.
        programs: of each role, at most; further tiles are taken in turn. 0: one a tile.
        chunk: tiles that share a flag, where programs have roles.
        registers: of a thread, at most, so that more programs run at a time. 0: as many as the compiler wants.
    """

    way: str
    tile: int = 1024
    warps: int = 4
    programs: int = 0
    chunk: int = 1
    registers: int = 0


@dataclass(frozen=True)
class Row:
    """A line of the table: `launch` for up to `values` values, or for more if it is the last of its kind."""

    ranks: int
    recipe: str
    fused: bool
    values: int
    launch: Launch


@cache
def table(path: Path = TABLE) -> tuple[Row, ...]:
    """The measured rows, by values; none if there is no file."""
    if not path.exists():
        return ()
    rows = json.loads(path.read_text())["rows"]
    found = [Row(**row | {"launch": Launch(**row["launch"])}) for row in rows]
    return tuple(sorted(found, key=lambda row: row.values))


def write(path: Path, rows: list[Row], conditions: dict) -> None:
    """Write a table with the conditions it was measured under, one row a line."""
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"conditions": {json.dumps(conditions)},\n "rows": [\n{lines}\n]}}\n')


def launch_for(ranks: int, recipe: AllReduceRecipe, values: int, fused: bool = False, parts: int = 1) -> Launch:
    """What reduces `values` numbers over `ranks` ranks fastest, as far as is known, each the sum of `parts`.

    Formats that were not measured are launched as int8, whose kernels are alike; Bf16, of twice the bytes, by `guess`.
    """
    launch = _measured(ranks, recipe, values, fused) or guess(ranks, recipe, values)
    spread = parts > 1 and not fused and launch.way == "words"
    return replace(launch, tile=128, warps=4) if spread else launch  # a value a thread, and its parts


def _measured(ranks: int, recipe: AllReduceRecipe, values: int, fused: bool) -> Launch | None:
    for name in (recipe.name, "int8") if recipe.name != "bf16" else (recipe.name,):
        rows = [row for row in table() if (row.ranks, row.recipe, row.fused) == (ranks, name, fused)]
        if rows:
            return next((row for row in rows if values <= row.values), rows[-1]).launch
    return None


def guess(ranks: int, recipe: AllReduceRecipe, values: int) -> Launch:
    """A launch for what was not measured: few bytes in one trip, many in as few bytes as there can be."""
    sent = recipe.bytes_of(values) * (ranks - 1)
    if sent <= 1 << 18:
        return Launch("words", tile=512, warps=2)
    if sent <= 1 << 20:
        return Launch("one-shot", tile=2048, warps=8, programs=264)
    return Launch("split" if ranks == 2 else "two-shot", tile=4096, warps=8, programs=264, chunk=4)
