"""Sizes of the state cache: how Megatron's dynamic context is told to keep slots of state and next to nothing else."""

from dataclasses import dataclass

import torch
from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from ..config import ModelConfig
from ..errors import UserError
from ..layers.model import SSMModel
from ..partition.layout import state_bytes

TOKEN_ROUNDER = 64  # DynamicInferenceContext.TOKEN_ROUNDER: other max_tokens fail in the middle of a prefill


@dataclass(frozen=True)
class CacheLimits:
    """How much runs at once.

    Args:
        max_requests: requests with a slot of state; others wait. Rounded up to a multiple of the TP size.
        max_tokens: tokens in one forward pass; longer prompts are prefilled in chunks of this size.
            Rounded up to a multiple of 64.
        max_sequence_length: prompt and answer of one request. State does not grow with it; the phantom attention cache
            does, by two values a token.
        ssm_dtype: dtype of the recurrent state; float32 keeps the recurrence from gathering error.
    """

    max_requests: int = 16
    max_tokens: int = 2048
    max_sequence_length: int = 32768
    ssm_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.ssm_dtype, torch.dtype) or not self.ssm_dtype.is_floating_point:
            raise UserError("ssm_dtype", self.ssm_dtype, "is no dtype of a state", "torch.float32, torch.bfloat16")
        for field in ("max_requests", "max_tokens", "max_sequence_length"):
            value = getattr(self, field)
            least = 2 if field == "max_sequence_length" else 1
            if not isinstance(value, int) or value < least:
                raise UserError(field, value, "is out of range", f"an integer, {least} or more")


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def phantom_bytes(limits: CacheLimits, dtype: torch.dtype) -> int:
    """Bytes that the phantom attention layer's cache takes for one request on one rank: a key and a value a token."""
    return 2 * dtype.itemsize * limits.max_sequence_length


def inference_config(
    model: SSMModel, config: ModelConfig, limits: CacheLimits, pg_collection: ProcessGroupCollection
) -> InferenceConfig:
    """Megatron's InferenceConfig with exactly `max_requests` slots of state.

    Whatever the buffer holds beyond the state becomes attention cache, so it is sized to one block of
    max_sequence_length phantom tokens a request, and the dummy block that Megatron wants.
    """
    tp, dtype = pg_collection.tp.size(), model.config.params_dtype
    requests = _rounded_up(limits.max_requests, tp)
    per_request = state_bytes(config, tp, dtype.itemsize, limits.ssm_dtype.itemsize)
    block = phantom_bytes(limits, dtype)
    # Megatron divides in floating point: half a block more keeps the count from falling one short.
    buffer = requests * per_request + (requests + 1) * block + block // 2
    return InferenceConfig(
        block_size_tokens=limits.max_sequence_length,
        buffer_size_gb=buffer / 1024**3,
        mamba_inference_state_config=MambaInferenceStateConfig.from_model(model, ssm_states_dtype=limits.ssm_dtype),
        max_requests=requests,
        max_tokens=_rounded_up(max(limits.max_tokens, requests), TOKEN_ROUNDER),
        max_sequence_length=limits.max_sequence_length,
        pg_collection=pg_collection,
        enable_chunked_prefill=True,
        offset_sampling_seed_by_dp_rank=False,
    )
