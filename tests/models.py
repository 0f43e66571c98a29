"""Small Hugging Face models, written to disk once a session, with what Hugging Face computes from them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

# No power of two, a prime vocabulary, and d_inner = 88 that 1, 2 and 4 ranks can share.
SIZES = {
    "vocab_size": 101,
    "hidden_size": 44,
    "state_size": 5,
    "num_hidden_layers": 3,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
# 8 heads of 9 channels for up to 8 ranks; d_inner = 72 = 2 x 36
MAMBA2_SIZES = {"hidden_size": 36, "num_heads": 8, "head_dim": 9, "state_size": 5, "n_groups": 1, "chunk_size": 16}
CLASSES = {
    "mamba": (MambaConfig, MambaForCausalLM),
    "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM),
    "mamba2": (Mamba2Config, Mamba2ForCausalLM),
}


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint directory and the model that was saved there."""

    path: Path
    hf: torch.nn.Module

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        # Without a mask of ones HF takes prompt tokens that equal pad_token_id for padding.
        mask = torch.ones_like(ids)
        with torch.no_grad():
            out = self.hf.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return out[0, len(prompt) :].tolist()


def _spread_values(model: torch.nn.Module) -> None:
    """Random values everywhere: a wrong slice or a swapped band must not fall on equal numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name or name.endswith("mixer.D"):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith(("A_log", "dt_proj.bias", "dt_bias")):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 0.2))


def make_tiny(folder: Path, family: str, *, tied: bool = True, seed: int = 0, **overrides) -> TinyModel:
    """Build, fill and save a model; `overrides` go to the HF config."""
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[family]
    sizes = dict(SIZES)
    if family == "falcon_mamba":
        sizes |= {"expand": 16, "intermediate_size": 88}  # as falcon-mamba-7b: expand is not to be trusted
    if family == "mamba2":
        sizes |= MAMBA2_SIZES
    model = model_class(config_class(**(sizes | {"tie_word_embeddings": tied} | overrides))).eval()
    _spread_values(model)
    model.tie_weights()
    model.save_pretrained(folder)
    return TinyModel(folder, model)
