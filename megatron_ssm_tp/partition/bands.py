"""Bands and packings: which elements of one axis belong together, and which of them each rank gets.

A packed weight holds several projections along one axis, say in_proj = [x; z]. Cutting that axis into p equal blocks
would give rank 0 all of x and none of z. So each *band* is cut by itself, and a rank keeps its piece of every band:

    global rows   x0 x1 x2 x3 z0 z1 z2 z3        (contiguous; interleaved would be x0 z0 x1 z1 ...)
    rank 0 of 2   x0 x1 z0 z1                    (always contiguous bands, whatever the file's order)
    rank 1 of 2   x2 x3 z2 z3

Positions inside a band are *band elements*; where they lie on the global axis is the packing's affair alone.
"""

from dataclasses import dataclass
from enum import Enum


class Uneven(Enum):
    """What to do where the TP size does not divide a band's units."""

    REFUSE = "refuse"  # an error that names the legal sizes
    REPLICATE = "replicate"  # units that divide the TP size are kept whole, each by tp / units neighbouring ranks
    PAD = "pad"  # the last ranks get less, and zeros fill their share (vocabulary rows)


@dataclass(frozen=True)
class Band:
    """A run of `size` elements in `units` equal atoms (heads, groups) that no cut may split; None: single elements.

    `dimension` is the configuration's name for the number of atoms, where that is not the band's own name. The band is
    `sections` equal parts, with weights of their own each: a rank holds whole ones, or a piece of one (Zamba's heads).
    """

    name: str
    size: int
    units: int | None = None
    uneven: Uneven = Uneven.REFUSE
    dimension: str | None = None
    sections: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.atoms < 1 or self.size % self.atoms:
            raise ValueError(f"band {self.name}: size {self.size} is not made of {self.units} equal units")
        if self.sections < 1 or self.size % self.sections:
            raise ValueError(f"band {self.name}: size {self.size} is not made of {self.sections} equal sections")

    @property
    def atoms(self) -> int:
        return self.size if self.units is None else self.units

    def allows(self, tp: int) -> bool:
        """Whether `tp` ranks can share this band."""
        return self.obstacle(tp) is None

    def obstacle(self, tp: int) -> str | None:
        """Why `tp` ranks cannot share this band; None if they can."""
        what = self.dimension or self.name
        replicated = self.uneven is Uneven.REPLICATE and tp % self.atoms == 0
        if not (self.uneven is Uneven.PAD or self.atoms % tp == 0 or replicated):
            return f"does not divide {what} ({self.atoms})"
        if self.sections % tp and tp % self.sections:
            return f"neither divides the {self.sections} sections of {what} nor is a multiple of them"
        return None

    def is_shared(self, tp: int) -> bool:
        """Whether several of `tp` ranks hold the same elements."""
        return self.uneven is Uneven.REPLICATE and self.atoms < tp

    def local_size(self, tp: int) -> int:
        """Elements each of `tp` ranks holds, zeros for padding included: the same on every rank."""
        atom = self.size // self.atoms
        return atom * max(1, -(-self.atoms // tp))

    def range_of(self, rank: int, tp: int) -> tuple[int, int]:
        """Band elements [start, stop) of `rank` of `tp`; empty where only padding is left."""
        if not self.allows(tp):
            raise ValueError(f"band {self.name}: {self.atoms} units cannot be shared by {tp} ranks")
        local = self.local_size(tp)
        start = (rank * self.atoms // tp if self.is_shared(tp) else rank) * local
        return min(start, self.size), min(start + local, self.size)


@dataclass(frozen=True)
class Packing:
    """Bands along one axis, one after the other, or `interleaved` element by element (Zamba-1's in_proj)."""

    bands: tuple[Band, ...]
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.interleaved and len({band.size for band in self.bands}) > 1:
            raise ValueError("interleaved bands must have one size")
        if len({band.name for band in self.bands}) != len(self.bands):
            raise ValueError("band names must differ")

    @property
    def size(self) -> int:
        return sum(band.size for band in self.bands)

    def allows(self, tp: int) -> bool:
        return all(band.allows(tp) for band in self.bands)

    def local_size(self, tp: int) -> int:
        return sum(band.local_size(tp) for band in self.bands)

    def global_slice(self, index: int, start: int, stop: int) -> slice:
        """Where elements [start, stop) of band `index` lie on the global axis."""
        if self.interleaved:
            step = len(self.bands)
            return slice(index + step * start, index + step * (stop - 1) + 1 if stop > start else index, step)
        offset = sum(band.size for band in self.bands[:index])
        return slice(offset + start, offset + stop, 1)
