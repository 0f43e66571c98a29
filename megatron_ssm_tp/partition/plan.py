"""Plans: what each rank holds of one axis, and what moves when the number of ranks changes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import UserError
from .bands import Packing


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of band `band`, kept by one rank at [local, local + stop - start) of its own axis."""

    band: int
    start: int
    stop: int
    local: int

    @property
    def local_slice(self) -> slice:
        return slice(self.local, self.local + self.stop - self.start)


@dataclass(frozen=True)
class Plan:
    """One axis, packed as `packing`, shared by `tp` ranks."""

    packing: Packing
    tp: int

    @property
    def local_size(self) -> int:
        return self.packing.local_size(self.tp)

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The non-empty pieces of `rank`, in local order. What no piece covers is padding and holds zeros."""
        found, local = [], 0
        for index, band in enumerate(self.packing.bands):
            start, stop = band.range_of(rank, self.tp)
            if stop > start:
                found.append(Piece(index, start, stop, local))
            local += band.local_size(self.tp)
        return tuple(found)

    def global_slice(self, piece: Piece) -> slice:
        return self.packing.global_slice(piece.band, piece.start, piece.stop)


@dataclass(frozen=True)
class Move:
    """Copy `source_slice` of rank `source` (old plan) to `target_slice` of rank `target` (new plan)."""

    source: int
    source_slice: slice
    target: int
    target_slice: slice


def moves(old: Plan, new: Plan) -> Iterator[Move]:
    """What to copy so that shards cut by `old` become shards cut by `new`: each new element exactly once.

    Raises:
        ValueError: the two plans are not for the same packing.
    """
    if old.packing != new.packing:
        raise ValueError("plans of different packings")
    for target in range(new.tp):
        for piece in new.pieces(target):
            done = piece.start
            for source in range(old.tp):
                for held in old.pieces(source):
                    # Replicated bands are held more than once: the first holder of the next element gives it.
                    if held.band != piece.band or not held.start <= done < min(held.stop, piece.stop):
                        continue
                    stop = min(held.stop, piece.stop)
                    from_, to = held.local + done - held.start, piece.local + done - piece.start
                    width = stop - done
                    yield Move(source, slice(from_, from_ + width), target, slice(to, to + width))
                    done = stop


LEGAL_LIMIT = 64  # as far as messages list legal sizes


def legal_tp(packings: Iterable[Packing], limit: int = LEGAL_LIMIT) -> list[int]:
    """TP sizes up to `limit` that every packing allows."""
    packings = set(packings)
    return [tp for tp in range(1, limit + 1) if all(packing.allows(tp) for packing in packings)]


def check_tp(packings: Iterable[Packing], tp: int) -> None:
    """Raise UserError, naming the first band in the way and the legal sizes, unless every packing allows `tp`."""
    packings = list(packings)
    legal = f"{', '.join(map(str, legal_tp(packings)))} (to {LEGAL_LIMIT})"
    if tp < 1:
        raise UserError("tensor_model_parallel_size", tp, "is not a positive number", legal)
    for packing in packings:
        for band in packing.bands:
            if problem := band.obstacle(tp):
                raise UserError("tensor_model_parallel_size", tp, problem, legal)
