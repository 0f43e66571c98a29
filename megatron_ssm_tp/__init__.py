"""State-space language models with tensor parallelism, on Megatron-Core."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Looked up on first use: `import megatron_ssm_tp` and the spec modules stay light.
_LAZY = {
    "LLM": "megatron_ssm_tp.inference.llm",
    "GenerationOutput": "megatron_ssm_tp.inference.requests",
    "Bursts": "megatron_ssm_tp.inference.running",
    "CacheLimits": "megatron_ssm_tp.inference.state",
    "SamplingParams": "megatron.core.inference.sampling_params",
    "Bf16": "megatron_ssm_tp.comm.recipes",
    "Int8BlockScaling": "megatron_ssm_tp.comm.recipes",
    "Float8BlockScaling": "megatron_ssm_tp.comm.recipes",
    "Int4BlockScaling": "megatron_ssm_tp.comm.recipes",
    "RecipeBook": "megatron_ssm_tp.comm.recipe_book",
    "allreduce_autocast": "megatron_ssm_tp.comm.autocast",
    "set_recipes": "megatron_ssm_tp.layers.row_parallel",
    "UserError": "megatron_ssm_tp.errors",
    "PeerLostError": "megatron_ssm_tp.errors",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quiet_imports():
        return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Megatron's imports warn of Apex and Transformer Engine, torch's of a missing CUDA; none of it is needed."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
