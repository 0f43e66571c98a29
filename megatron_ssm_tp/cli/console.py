"""Who speaks and how a run ends: rank 0 alone prints, every rank exits with the same kind of status."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from ..errors import PeerLostError, UserError

USER_ERROR, RUN_ERROR = 2, 1
# torchrun ends all ranks when the first one exits: the silent ones leave rank 0 time to speak.
_LET_RANK_0_SPEAK = 1.0


def is_speaker() -> bool:
    """Whether this process is rank 0, or the only one (torchrun and slurm launchers set RANK)."""
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str = "", end: str = "\n") -> None:
    if is_speaker():
        print(text, end=end, flush=True)


def fail(message: str) -> NoReturn:
    """End every rank with status 2; rank 0 prints the one line."""
    if is_speaker():
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(_LET_RANK_0_SPEAK)
    sys.exit(USER_ERROR)


class Parser(argparse.ArgumentParser):
    """Argument errors in one line, from rank 0, without the usage text."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def guarded(run: Callable[[], None]) -> int:
    """Run a subcommand; returns its exit status. What the user can cause becomes one line."""
    try:
        run()
    except UserError as mistake:
        fail(str(mistake))
    except PeerLostError as loss:
        # Whoever notices says so: rank 0 may be the one that is gone. Skips destructors that would wait for it.
        print(f"error: {loss}", file=sys.stderr, flush=True)
        os._exit(RUN_ERROR)
    except KeyboardInterrupt:
        say("\ninterrupted")
        return RUN_ERROR
    return 0
