"""State-space language models with tensor parallelism, on Megatron-Core."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Looked up on first use: `import megatron_ssm_tp` and the spec modules stay light.
_LAZY = {
    "LLM": "megatron_ssm_tp.inference.llm",
    "GenerationOutput": "megatron_ssm_tp.inference.requests",
    "CacheLimits": "megatron_ssm_tp.inference.state",
    "SamplingParams": "megatron.core.inference.sampling_params",
    "UserError": "megatron_ssm_tp.errors",
    "PeerLostError": "megatron_ssm_tp.errors",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
