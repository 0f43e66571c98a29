"""Errors a user can cause or meet, each one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the caller gave is wrong: names the field, the value, and what would be legal.

    Every rank raises the same, unless `of_one_rank` says that the others may not know of it.
    """

    of_one_rank = False

    def __init__(self, field: str, value: object, problem: str, legal: str) -> None:
        self.field, self.value, self.problem, self.legal = field, value, problem, legal
        super().__init__(f"{field}={_short(value)}: {problem}; legal: {legal}")

    def __reduce__(self):  # so that one rank can send it to the others
        return type(self), (self.field, _Shown(_short(self.value)), self.problem, self.legal)


@contextmanager
def renamed(field: str | Callable[[str], str]) -> Iterator[None]:
    """Within, a UserError is of `field`, by what its caller calls the thing; a function makes it of the name it had."""
    try:
        yield
    except UserError as error:
        name = field if isinstance(field, str) else field(error.field)
        found = UserError(name, error.value, error.problem, error.legal)
        found.of_one_rank = error.of_one_rank
        raise found from None


class _Shown(str):
    """A value as it is shown: any value can be sent to other ranks this way."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _short(value: object) -> str:
    shown = repr(value).replace("\n", " ")
    return shown if len(shown) <= 120 else f"{shown[:100]}... ({len(shown)} characters)"


class PeerLostError(RuntimeError):
    """A collective failed: another tensor-parallel rank ended or cannot be reached."""
