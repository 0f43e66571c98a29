"""Who speaks and how a run ends: rank 0 alone prints, every rank exits with the same kind of status."""

import argparse
import faulthandler
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from ..errors import PeerLostError, UserError

RUN_ERROR, USER_ERROR, INTERRUPTED = 1, 2, 130
# torchrun ends all ranks when the first one exits: the silent ones leave rank 0 time to speak.
_LET_RANK_0_SPEAK = 1.0
# What the library calls a thing, where the command line calls it otherwise.
_FLAGS = {
    "recipe": "--tp-allreduce-recipe",
    "min_bytes": "--tp-allreduce-min-bytes",
    "path": "--load",
    "num_tokens_to_generate": "--max-new-tokens",
    "tokenizer": "--tokenizer-model",
}


def is_speaker() -> bool:
    """Whether this process is rank 0, or the only one (torchrun and slurm launchers set RANK)."""
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str = "", end: str = "\n") -> None:
    if is_speaker():
        print(text, end=end, flush=True)


def leave(status: int) -> NoReturn:
    """End the process at once: destructors of a process group that others have left may wait, or abort."""
    sys.stderr.flush()
    os._exit(status)


def fail(message: str, of_one_rank: bool = False) -> NoReturn:
    """End with status 2, as every rank does; rank 0 prints the one line, or this rank if the others do not know."""
    if is_speaker() or of_one_rank:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(_LET_RANK_0_SPEAK)
    leave(USER_ERROR)


def quieted() -> None:
    """Leave what Megatron says while it runs, and its stack dumps, to those who develop it. Call it once all that
    imports Megatron's engines is imported."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", message="all-reduces are quantized")  # ours: by the slower backend
    for number in (signal.SIGINT, signal.SIGTERM):
        faulthandler.unregister(number)  # Megatron's coordinator registers a dump for both when it is imported


class Parser(argparse.ArgumentParser):
    """Argument errors in one line, from rank 0, without the usage text."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def guarded(run: Callable[[], None]) -> int:
    """Run a subcommand; returns its exit status. What the user can cause becomes one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    try:
        run()
    except UserError as mistake:
        shown = UserError(_flag(mistake.field), mistake.value, mistake.problem, mistake.legal)
        fail(str(shown), mistake.of_one_rank)
    except PeerLostError as loss:
        # Whoever notices says so: rank 0 may be the one that is gone.
        print(f"error: {loss}", file=sys.stderr, flush=True)
        leave(RUN_ERROR)
    except BrokenPipeError:  # whoever read our output has enough
        leave(RUN_ERROR)
    except KeyboardInterrupt:
        say("\ninterrupted")
        leave(INTERRUPTED)
    return 0


def _flag(field: str) -> str:
    """The option of this field, if it is one's: options are the library's names with dashes."""
    if field in _FLAGS:
        return _FLAGS[field]
    return f"--{field.replace('_', '-')}" if field in _OPTIONS else field


_OPTIONS = {
    "tensor_model_parallel_size",
    "prompt_file",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "engine",
    "prefix_bytes",
    "seed",
    "ops",
    "tp_overlap_from",
    "tp_overlap",
    "dtype",
    "max_sequence_length",
    "max_requests",
    "max_tokens",
    "max_cached_tokens",
    "tp_allreduce_recipe",
    "tp_allreduce_min_bytes",
    "tp_allreduce_cfg",
    "json",
}
