"""The families with attention, each in the settings that take another path through the layers."""

import pytest

ZAMBA2_GROUPS = {"mamba_ngroups": 2, "use_shared_attention_adapter": False, "use_mem_rope": False}
FALCON_NORM = {"mamba_rms_norm": True}

# id: family, options of Hugging Face's config
VARIANTS = {
    "mamba2": ("mamba2", {"n_groups": 2, "tied": False}),
    "zamba": ("zamba", {}),
    "zamba-biased": ("zamba", {"mamba_proj_bias": True, "mamba_conv_bias": False, "rms_norm_eps": 1e-2}),
    "zamba-1-head": ("zamba", {"n_mamba_heads": 1}),
    "zamba-4-heads": ("zamba", {"n_mamba_heads": 4}),
    "zamba2": ("zamba2", {}),
    "zamba2-2-groups": ("zamba2", {**ZAMBA2_GROUPS, "add_bias_linear": True}),
    "bamba": ("bamba", {"tied": False}),
    "bamba-biased": ("bamba", {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True}),
    "falcon_h1": ("falcon_h1", {"tied": False}),
    "falcon_h1-norm": ("falcon_h1", {**FALCON_NORM, "projectors_bias": True, "attention_bias": True}),
    "falcon_h1-2-groups": ("falcon_h1", {**FALCON_NORM, "mamba_norm_before_gate": False, "mamba_n_groups": 2}),
    "nemotron_h": ("nemotron_h", {"tied": False}),
    "nemotron_h-8-groups": ("nemotron_h", {"n_groups": 8, "use_bias": True, "mlp_bias": True}),
}
EVERY = pytest.mark.parametrize("variant", VARIANTS)
ONE_OF_EACH = ["zamba", "zamba2", "bamba", "falcon_h1-2-groups", "nemotron_h"]
ONE_EACH = pytest.mark.parametrize("variant", ONE_OF_EACH)
