"""Small Hugging Face models, written to disk once a session, with what Hugging Face computes from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
)

from megatron_ssm_tp.checkpoint.loader import Source

# No power of two, and a prime vocabulary.
COMMON = {
    "vocab_size": 101,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
MAMBA = {
    "hidden_size": 44,
    "state_size": 5,
    "num_hidden_layers": 3,
}  # d_inner = 88, which 1, 2, 4 and 8 ranks can share
ATTENTION = {"num_attention_heads": 8, "num_key_value_heads": 2}  # a head of keys for several of 4 or 8 ranks
MIXER_OF_BAMBA = {"mamba_n_heads": 8, "mamba_d_state": 5, "mamba_chunk_size": 16}
MULTIPLIERS = {  # every one another number: whoever forgets or swaps one differs
    "embedding_multiplier": 1.7,
    "lm_head_multiplier": 0.6,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "key_multiplier": 1.4,
    "ssm_in_multiplier": 0.9,
    "ssm_out_multiplier": 1.2,
    "ssm_multipliers": [1.1, 0.7, 1.5, 0.85, 1.25],
    "mlp_multipliers": [0.75, 1.35],
}
ZAMBA_LAYERS = ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"]


@dataclass(frozen=True)
class Kind:
    """Hugging Face's classes of a family, and sizes for a small model of it."""

    config: type
    model: type
    sizes: dict


KINDS = {
    "mamba": Kind(MambaConfig, MambaForCausalLM, MAMBA),
    # as falcon-mamba-7b: expand is not to be trusted
    "falcon_mamba": Kind(FalconMambaConfig, FalconMambaForCausalLM, MAMBA | {"expand": 16, "intermediate_size": 88}),
    # 8 heads of 9 channels for up to 8 ranks; d_inner = 72 = 2 x 36
    "mamba2": Kind(
        Mamba2Config,
        Mamba2ForCausalLM,
        MAMBA | {"hidden_size": 36, "num_heads": 8, "head_dim": 9, "n_groups": 1, "chunk_size": 16},
    ),
    "zamba": Kind(
        ZambaConfig,
        ZambaForCausalLM,
        {
            "hidden_size": 44,
            "mamba_d_state": 5,
            "layers_block_type": ZAMBA_LAYERS,
            "num_hidden_layers": len(ZAMBA_LAYERS),
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "intermediate_size": 72,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": Kind(
        Zamba2Config,
        Zamba2ForCausalLM,
        {
            "hidden_size": 40,
            "n_mamba_heads": 8,
            "mamba_d_state": 5,
            "chunk_size": 16,
            "layers_block_type": ZAMBA_LAYERS,
            "num_hidden_layers": len(ZAMBA_LAYERS),
            "num_attention_heads": 8,
            "intermediate_size": 72,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "adapter_rank": 3,
            "use_mem_rope": True,
        },
    ),
    "bamba": Kind(
        BambaConfig,
        BambaForCausalLM,
        ATTENTION
        | MIXER_OF_BAMBA
        | {"hidden_size": 40, "num_hidden_layers": 3, "attn_layer_indices": [1], "intermediate_size": 56},
    ),
    "falcon_h1": Kind(
        FalconH1Config,
        FalconH1ForCausalLM,
        ATTENTION
        | MIXER_OF_BAMBA
        | MULTIPLIERS
        | {"hidden_size": 40, "num_hidden_layers": 2, "mamba_d_ssm": 72, "head_dim": 6, "intermediate_size": 56},
    ),
    "nemotron_h": Kind(
        NemotronHConfig,
        NemotronHForCausalLM,
        ATTENTION
        | {
            "hidden_size": 40,
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"],
            "head_dim": 7,
            "intermediate_size": 56,
            "mamba_num_heads": 8,
            "mamba_head_dim": 9,
            "ssm_state_size": 5,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint directory and the model that was saved there."""

    path: Path
    hf: torch.nn.Module

    def greedy(self, prompt: list[int], count: int, use_cache: bool = True, **more: float) -> list[int]:
        """`more`: for Hugging Face's generate."""
        ids = torch.tensor([prompt])
        # Without a mask of ones HF takes prompt tokens that equal pad_token_id for padding.
        mask = torch.ones_like(ids)
        with torch.no_grad():
            options = {"max_new_tokens": count, "do_sample": False, "use_cache": use_cache, **more}
            out = self.hf.generate(ids, attention_mask=mask, **options)
        return out[0, len(prompt) :].tolist()


def _spread_values(model: torch.nn.Module) -> None:
    """Random values everywhere: a wrong slice or a swapped band must not fall on equal numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name or name.endswith((".D",)):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith(("A_log", "dt_proj.bias", "dt_proj_bias", "dt_bias")):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 0.2))


def make_tiny(folder: Path, family: str, *, tied: bool = True, seed: int = 0, **overrides) -> TinyModel:
    """Build, fill and save a model; `overrides` go to the HF config."""
    torch.manual_seed(seed)
    kind = KINDS[family]
    model = kind.model(kind.config(**(COMMON | kind.sizes | {"tie_word_embeddings": tied} | overrides))).eval()
    _spread_values(model)
    model.tie_weights()
    model.save_pretrained(folder)
    return TinyModel(folder, model)


def as_stored_in(source: Source, of_file: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One of our parameters, or its gradient, put together whole from Hugging Face's tensors."""
    # Nemotron-H is saved under other names than it has in memory.
    tensors = [of_file.get(name, of_file.get(name.replace("backbone.", "model.", 1))) for name in source.stored.names]
    if source.stored.heads_axis is not None:
        return source.stored.arranged(tensors[0])
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=source.parameter.axis)
