"""Files that a command writes when its work is done."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .console import is_speaker


def check_writable(field: str, path: str | None) -> None:
    """Raises UserError, before the work, for what could only fail after it; on rank 0, which writes."""
    if path is None or not is_speaker():
        return
    file, legal = Path(path), "a file in a folder that can be written to"
    try:
        there = file.exists()
        if not file.name or (there and not file.is_file()):
            raise UserError(field, path, "cannot be written", legal)
        if there:
            file.open("ab").close()  # one that is read-only is not replaced
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(field, path, f"cannot be written ({error.strerror})", legal) from None


@contextmanager
def whole_file(field: str, path: str) -> Iterator[Path]:
    """Where to write what becomes the file once all of it is there. Raises UserError: it cannot be written."""
    file = Path(path)
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(field, path, f"cannot be written ({error})", "a file that can be written") from error


def write_whole(field: str, path: str, text: str) -> None:
    """All of the file or none of it. Raises UserError: see `whole_file`."""
    with whole_file(field, path) as partial:
        partial.write_text(text, encoding="utf-8")
