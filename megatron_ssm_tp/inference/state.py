"""Sizes of the state cache: how Megatron's dynamic context is told to keep slots of state and next to nothing else."""

from dataclasses import dataclass

import psutil
import torch
from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from ..config import ModelConfig
from ..errors import UserError
from ..layers.model import SSMModel
from ..partition.layout import kv_bytes, state_bytes

TOKEN_ROUNDER = 64  # DynamicInferenceContext.TOKEN_ROUNDER: other max_tokens fail in the middle of a prefill

DEFAULT_CACHED_TOKENS = 32768
BLOCK_TOKENS = 256  # tokens of keys and values that are kept together; flash-attn wants multiples of it


@dataclass(frozen=True)
class CacheLimits:
    """How much runs at once.

    Args:
        max_requests: requests with a slot of state; others wait. Rounded up to a multiple of the TP size.
        max_tokens: tokens in one forward pass; longer prompts are prefilled in chunks of this size.
            Rounded up to a multiple of 64.
        max_sequence_length: prompt and answer of one request. State does not grow with it; without attention a phantom
            cache does, by two values a token.
        max_cached_tokens: tokens of all running requests together whose keys and values fit (models with attention);
            who finds no room waits, or is put back and read again. At least one request's; None is 32768, or that.
        prefix_bytes: of the states on a rank that are kept after prefixes which prompts share, beside the slots; 0:
            none are. Our own engine's alone.
        ssm_dtype: dtype of the recurrent state; float32 keeps the recurrence from gathering error.
    """

    max_requests: int = 16
    max_tokens: int = 2048
    max_sequence_length: int = 32768
    max_cached_tokens: int | None = None
    ssm_dtype: torch.dtype = torch.float32
    prefix_bytes: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.ssm_dtype, torch.dtype) or not self.ssm_dtype.is_floating_point:
            raise UserError("ssm_dtype", self.ssm_dtype, "is no dtype of a state", "torch.float32, torch.bfloat16")
        leasts = {"max_requests": 1, "max_tokens": 1, "max_sequence_length": 2, "prefix_bytes": 0}
        for field, least in leasts.items():
            value = getattr(self, field)
            if type(value) is not int or value < least:
                raise UserError(field, value, "is out of range", f"an integer, {least} or more")
        cached, least = self.max_cached_tokens, self.max_sequence_length
        if cached is not None and (type(cached) is not int or cached < least):
            legal = f"an integer, max_sequence_length ({least}) or more"
            raise UserError("max_cached_tokens", cached, "is out of range", legal)

    @property
    def cached_tokens(self) -> int:
        """max_cached_tokens, or its default: no more than all requests could ever fill."""
        most = self.max_requests * self.max_sequence_length
        return self.max_cached_tokens or max(self.max_sequence_length, min(DEFAULT_CACHED_TOKENS, most))


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def phantom_bytes(limits: CacheLimits, dtype: torch.dtype) -> int:
    """Bytes that the phantom attention layer's cache takes for one request on one rank: a key and a value a token."""
    return 2 * dtype.itemsize * limits.max_sequence_length


def _attention_cache(config: ModelConfig, limits: CacheLimits, requests: int, tp: int, dtype: torch.dtype) -> tuple:
    """Tokens a block, blocks, and bytes of one: the phantom's is one block of the longest sequence a request."""
    if config.attention is None:
        return limits.max_sequence_length, requests, phantom_bytes(limits, dtype)
    # A request's last block is partly empty.
    blocks = -(-limits.cached_tokens // BLOCK_TOKENS) + requests
    return BLOCK_TOKENS, blocks, BLOCK_TOKENS * kv_bytes(config, tp, dtype.itemsize)


def check_room(config: InferenceConfig, device: torch.device) -> None:
    """Raises UserError unless the cache fits in what is free: failing to allocate it may end the process."""
    _check_free(
        config.buffer_size_gb * 1024**3, device, "smaller max_requests, max_cached_tokens or max_sequence_length"
    )


def check_slots_fit(size: int, device: torch.device) -> None:
    """As check_room, for `size` bytes of slots."""
    _check_free(size, device, "smaller max_requests or prefix_bytes")


def _check_free(size: float, device: torch.device, legal: str) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if size > free:
        problem = f"does not fit beside the weights, {free / 1024**3:.2f} GiB are free"
        raise UserError("cache", f"{size / 1024**3:.2f} GiB", problem, legal)


def inference_config(
    model: SSMModel, config: ModelConfig, limits: CacheLimits, pg_collection: ProcessGroupCollection
) -> InferenceConfig:
    """Megatron's InferenceConfig with exactly `max_requests` slots of state.

    Whatever the buffer holds beyond the state becomes attention cache, so it is sized to the blocks that are wanted and
    the dummy one of Megatron's.
    """
    tp, dtype = pg_collection.tp.size(), model.config.params_dtype
    requests = _rounded_up(limits.max_requests, tp)
    per_request = state_bytes(config, tp, dtype.itemsize, limits.ssm_dtype.itemsize)
    tokens, blocks, block = _attention_cache(config, limits, requests, tp, dtype)
    # Megatron divides in floating point: half a block more keeps the count from falling one short.
    buffer = requests * per_request + (blocks + 1) * block + block // 2
    return InferenceConfig(
        block_size_tokens=tokens,
        buffer_size_gb=buffer / 1024**3,
        mamba_inference_state_config=MambaInferenceStateConfig.from_model(model, ssm_states_dtype=limits.ssm_dtype),
        max_requests=requests,
        max_tokens=_rounded_up(max(limits.max_tokens, requests), TOKEN_ROUNDER),
        max_sequence_length=limits.max_sequence_length,
        pg_collection=pg_collection,
        enable_chunked_prefill=True,
        offset_sampling_seed_by_dp_rank=False,
    )
