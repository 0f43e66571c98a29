"""Sizes of models that bench_inference.py measures, and of those in a config.json."""

from dataclasses import replace

from megatron_ssm_tp.checkpoint.families import find_family
from megatron_ssm_tp.config import Layer, ModelConfig
from megatron_ssm_tp.errors import UserError

_ZAMBA2_7B_HYBRID = (6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77)

# What the checkpoints' config.json say.
MODELS: dict[str, dict] = {
    "mamba-2.8b": {
        "model_type": "mamba",
        "hidden_size": 2560,
        "intermediate_size": 5120,
        "num_hidden_layers": 64,
        "state_size": 16,
        "time_step_rank": 160,
        "vocab_size": 50280,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
    },
    "falcon-mamba-7b": {
        "model_type": "falcon_mamba",
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 64,
        "state_size": 16,
        "time_step_rank": 256,
        "vocab_size": 65024,
        "residual_in_fp32": True,
        "tie_word_embeddings": False,
    },
    "mamba2-2.7b": {
        "d_model": 2560,
        "n_layer": 64,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "pad_vocab_size_multiple": 16,
        "residual_in_fp32": True,
        "tie_embeddings": True,
    },
    "zamba2-7b": {
        "model_type": "zamba2",
        "hidden_size": 3584,
        "num_hidden_layers": 81,
        "layers_block_type": ["hybrid" if layer in _ZAMBA2_7B_HYBRID else "mamba" for layer in range(81)],
        "n_mamba_heads": 112,
        "mamba_headdim": 64,
        "mamba_ngroups": 2,
        "mamba_d_state": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 14336,
        "num_mem_blocks": 2,
        "adapter_rank": 128,
        "use_shared_attention_adapter": False,
        "use_mem_rope": True,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}


def read_model(raw: dict, layers: int | None = None) -> tuple[ModelConfig, int]:
    """The model of a config.json, cut to its first `layers`, and how many it has whole.

    Raises:
        UserError: the model is of no known family, or has not so many layers, or none that calls a block among them.
    """
    whole = find_family(raw).config(raw)
    count, first = len(whole.layers), min(whole.callers, default=0) + 1
    if layers is None:
        return whole, count
    if not first <= layers <= count:
        raise UserError("--layers", layers, "is no part of this model's layers", f"{first} to {count}")
    cut = replace(whole, layers=whole.layers[:layers])
    if cut.shared:
        cut = replace(cut, shared=replace(cut.shared, count=min(cut.shared.count, cut.count(Layer.SHARED))))
    return cut, count
