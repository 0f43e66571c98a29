"""Which engine runs a model, and building it with a cache that fits."""

import torch

from ..config import ModelConfig
from ..errors import UserError
from ..layers.model import SSMModel
from ..ranks import agree
from .engine import SlotEngine
from .megatron_engine import MegatronEngine
from .prefix_cache import PrefixCache
from .running import Bursts
from .slots import SlotTable
from .state import CacheLimits, check_room, check_slots_fit, inference_config
from .tokenizer import NoTokenizer, TextTokenizer


def pick_engine(name: str, config: ModelConfig, prefix_bytes: int = 0) -> str:
    """The name of the engine that runs the model: "slots" or "megatron".

    Raises:
        UserError: there is none of that name, or the model has layers that ours cannot run, or prefixes are to be kept
            by Megatron's.
    """
    if name not in ("auto", "slots", "megatron"):
        raise UserError("engine", name, "is no engine", "auto, slots, megatron")
    if name == "slots" and not config.is_pure_ssm:
        raise UserError("engine", name, "the model has other layers than SSMs", "auto, megatron")
    fitting = "slots" if config.is_pure_ssm else "megatron"
    picked = fitting if name == "auto" else name
    if picked == "megatron" and prefix_bytes:
        raise UserError("prefix_bytes", prefix_bytes, "Megatron's engine keeps no prefixes", "0")
    return picked


def build_engine(
    name: str,
    model: SSMModel,
    config: ModelConfig,
    tokenizer: TextTokenizer | NoTokenizer,
    limits: CacheLimits,
    bursts: Bursts | None,
    seed: int,
) -> SlotEngine | MegatronEngine:
    """The engine that `pick_engine` picks. A collective call.

    Raises:
        UserError: its cache does not fit on some rank; the same on all.
    """
    group, device = model.pg_collection.tp, model.embedding.word_embeddings.weight.device
    if pick_engine(name, config, limits.prefix_bytes) == "megatron":
        engine_config = inference_config(model, config, limits, model.pg_collection)
        agree(lambda: check_room(engine_config, device), group)
        return MegatronEngine(model, engine_config, tokenizer)
    sizes = (config, group.size(), limits.max_requests)
    dtypes: tuple[torch.dtype, torch.dtype] = (model.config.params_dtype, limits.ssm_dtype)
    agree(lambda: check_slots_fit(SlotTable.bytes_of(*sizes, *dtypes) + limits.prefix_bytes, device), group)
    prefixes = PrefixCache(limits.prefix_bytes) if limits.prefix_bytes else None
    return SlotEngine(model, SlotTable(*sizes, device, *dtypes), limits.max_tokens, bursts, seed, prefixes)
