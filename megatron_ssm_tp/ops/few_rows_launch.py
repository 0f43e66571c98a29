"""How few_rows.py's products are cut into programs; measured on H100s and an H200 with the sizes of Falcon-Mamba-7B."""

from dataclasses import dataclass

IN_LANES, IN_TILES = 2, 64  # rows of x at most
_NARROW = 16  # rows of x at most, for which tiles of more rows of the weight are faster
MOST_PARTS = 16
_ENOUGH, _ALL = 112, 132  # programs: that keep an H100's memory busy, and one for each multiprocessor


@dataclass(frozen=True)
class FewRowsLaunch:
    """How a product in lanes is launched.

    Args:
        rows: of the weight, of a program.
        block_k: columns of a tile; 256 for each warp are loaded 16 bytes a thread and never exchanged.
        warps: of a program.
        stages: tiles in flight, in registers.
    """

    rows: int
    block_k: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class TilesLaunch:
    """How a product in tiles is launched: `parts` of the columns, and for each tiles of [rows, block_k] of the weight,
    `stages` of them in flight, in shared memory. While the kernel before ends, the first `ahead` columns of a part come
    into the L2 cache."""

    parts: int
    stages: int = 4
    rows: int = 64
    block_k: int = 128
    warps: int = 4
    ahead: int = 256


def pick_launch(rows: int, columns: int, requests: int) -> FewRowsLaunch:
    """For a weight [rows, columns] and one or two rows of x."""
    if columns < 1024:
        return FewRowsLaunch(8, max(16, min(256, 1 << (columns - 1).bit_length())), 1)
    share = 1 if requests == 1 or rows < 1024 else 2  # of x, by the rows of a program
    return FewRowsLaunch(share, 2048 if columns >= 2048 else 1024, 8 if columns >= 2048 else 4)


def pick_tiles(rows: int, columns: int, requests: int) -> TilesLaunch | None:
    """For a weight [rows, columns] and up to IN_TILES rows of x; None: it cannot be cut so."""
    blocks, over = divmod(columns, TilesLaunch.block_k)
    if over or not IN_LANES < requests <= IN_TILES:
        return None
    tall = requests <= _NARROW and rows >= _ENOUGH * 2 * TilesLaunch.rows
    tile_rows = TilesLaunch.rows * (2 if tall else 1)
    tiles = -(-rows // tile_rows)
    possible = [parts for parts in range(1, min(MOST_PARTS, blocks // 2) + 1) if blocks % parts == 0]
    if not possible:
        return None
    parts = next((parts for parts in possible if parts * tiles >= _ENOUGH), possible[-1])
    return TilesLaunch(parts, _stages(parts * tiles, tall, requests), tile_rows)


def _stages(programs: int, tall: bool, requests: int) -> int:
    """As many as a multiprocessor has shared memory for."""
    if tall or (programs <= _ALL and requests <= _NARROW):
        return 5  # of its one program
    return 3 if requests > 32 and programs > _ALL else 4  # two programs with 96 KB each
