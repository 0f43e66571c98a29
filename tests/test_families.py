"""Traps of published checkpoints with attention: configs as they are on the hub, names that files really have."""

import jobs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import copy_of, edit_tensors, read_config

from megatron_ssm_tp.checkpoint.loader import open_model
from megatron_ssm_tp.config import Layer, RotaryConfig
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.partition.layout import legal_tp_sizes

ZAMBA = {"model_type": "zamba", "hidden_size": 3712, "num_hidden_layers": 76, "vocab_size": 32000}
ZAMBA |= {"attention_head_dim": 464, "attention_hidden_size": 7424, "intermediate_size": 14848, "mamba_dt_rank": 232}
ZAMBA2 = {"model_type": "zamba2", "hidden_size": 3584, "vocab_size": 32000, "mamba_d_state": 64, "mamba_ngroups": 2}
ZAMBA2 |= {"n_mamba_heads": 112, "mamba_headdim": 64, "num_attention_heads": 32, "num_mem_blocks": 2}
ZAMBA2 |= {"layers_block_type": ["mamba"] * 5 + ["hybrid", "mamba", "hybrid"], "use_mem_rope": True}
BAMBA = {"model_type": "bamba", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256}
BAMBA |= {"attn_layer_indices": [9, 18, 27], "mamba_d_state": 128, "mamba_d_head": 64, "rope_theta": 10000.0}
FALCON_H1 = {"model_type": "falcon_h1", "hidden_size": 3072, "num_hidden_layers": 44, "vocab_size": 130049}
FALCON_H1 |= {"mamba_d_ssm": 3072, "mamba_n_heads": 24, "mamba_d_head": 128, "mamba_expand": 2, "head_dim": 128}
FALCON_H1 |= {
    "intermediate_size": 12288,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_theta": 100000000000.0,
}
NEMOTRON = {"model_type": "nemotron_h", "hidden_size": 4096, "vocab_size": 131072, "mamba_num_heads": 128}
NEMOTRON |= {"hybrid_override_pattern": "M-M-M*-M-", "time_step_limit": [0.0, float("inf")]}
NEMOTRON |= {"time_step_min": 0.001, "tie_word_embeddings": True}


def test_zamba_7b_has_two_mamba_heads_and_one_block():
    config = read_config(ZAMBA)
    assert config.mixer.n_heads == 2 and config.mixer.d_inner == 7424 and config.mixer.dt_rank == 232
    assert config.shared.count == 1 and config.kv_caches == 13 and len(config.layers) == 76
    assert config.attention.scale == (464 / 2) ** -0.5 and config.attention.d_in == 7424
    assert [i for i, layer in enumerate(config.layers) if layer is Layer.SHARED][:3] == [2, 7, 13]
    assert legal_tp_sizes(config) == [1, 2, 4, 8, 16]


def test_zamba2_clamps_dt_and_turns_as_the_config_says():
    config = read_config(ZAMBA2)
    assert config.mixer.dt_limit == (0.001, float("inf")) and config.mixer.norm.groups == 2
    assert config.attention.rotary == RotaryConfig(10000.0, 224) and config.attention.n_kv_heads == 32
    assert read_config(ZAMBA2 | {"use_mem_rope": False}).attention.rotary is None
    assert config.mlp.d_ff == 4 * 3584 and config.mlp.activation == "gelu"
    assert legal_tp_sizes(config) == [1, 2, 4, 8, 16]


def test_bamba_turns_half_of_a_head():
    config = read_config(BAMBA)
    assert config.attention.rotary == RotaryConfig(10000.0, 64) and config.mixer.norm.groups == 1
    assert config.layers[18:20] == (Layer.ATTENTION, Layer.MLP) and config.count(Layer.ATTENTION) == 3
    assert legal_tp_sizes(config) == [1, 2, 4, 8, 16, 32]


def test_falcon_h1s_d_inner_is_not_twice_the_hidden_size():
    config = read_config(FALCON_H1 | {"ssm_multipliers": [0.5, 0.25, 0.1, 0.5, 0.4], "key_multiplier": 0.4})
    assert config.mixer.d_inner == 3072 and config.mixer.norm is None
    assert config.mixer.band_multipliers == (0.5, 0.25, 0.1, 0.5, 0.4) and config.attention.key_multiplier == 0.4
    assert legal_tp_sizes(config) == [1, 2, 4, 6, 12]  # not 3: two heads of keys
    normed = read_config(FALCON_H1 | {"mamba_rms_norm": True})
    assert normed.mixer.norm.before_gate  # the class's default


def test_nemotron_h_reads_patterns_and_is_never_tied():
    config = read_config(NEMOTRON)
    assert "".join(layer.name[0] for layer in config.layers) == "SMSMSAMSM" and not config.tied_embeddings
    assert read_config(NEMOTRON | {"mamba_dt_min": 0.5}).mixer.dt_limit[0] == 0.5  # as HF's class renames it
    assert read_config(NEMOTRON | {"num_key_value_heads": None}).attention.n_kv_heads == 32
    assert config.mixer.norm.groups == 8 and config.mixer.dt_limit[0] == 0.001 and config.attention.rotary is None
    assert config.mlp.activation == "relu2" and not config.mlp.gated


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "jamba"}, "model_type='jamba': needs mixture of experts; legal: mamba, falcon_mamba"),
        ({"model_type": "granitemoehybrid"}, "model_type='granitemoehybrid': needs mixture of experts"),
        (NEMOTRON | {"hybrid_override_pattern": "MEM*"}, "layers_block_type='moe': needs mixture of experts; legal:"),
        (NEMOTRON | {"hybrid_override_pattern": "MX"}, "layers_block_type='X': is not a kind of layer"),
        (ZAMBA2 | {"layers_block_type": ["mamba", "full_attention"]}, "'full_attention': is not a kind of layer"),
        (ZAMBA2 | {"num_hidden_layers": 7}, "num_hidden_layers=7: is not the number of layers_block_type; legal: 8"),
        (NEMOTRON | {"hybrid_override_pattern": "*-"}, "layers_block_type='none SSM': is not for this package"),
        (NEMOTRON | {"time_step_min": -0.1}, "time_step_min=-0.1: is not a time; legal: 0 or more"),
        (FALCON_H1 | {"mlp_multipliers": [float("nan"), 1.0]}, "mlp_multipliers=[nan, 1.0]: are not multipliers"),
        (FALCON_H1 | {"rope_parameters": {"hybrid": {"rope_theta": 1.0}}}, "rope_parameters='hybrid': is of one kind"),
        (FALCON_H1 | {"mamba_d_ssm": None, "mamba_expand": 1e-5}, "mamba_expand=1e-05: leaves no channel"),
        (ZAMBA2 | {"layers_block_type": None}, "layers_block_type=None: is not a list of layers"),
        (ZAMBA2 | {"layers_block_type": ["mamba"]}, "shares no block; legal: at least one hybrid layer"),
        (ZAMBA2 | {"hidden_act": "tanh"}, "hidden_act='tanh': is not implemented; legal: silu"),
        (ZAMBA2 | {"mamba_headdim": 60}, "mamba_headdim=60: x 112 heads is not 7168"),
        (ZAMBA2 | {"num_key_value_heads": 5}, "num_key_value_heads=5: does not divide num_attention_heads (32)"),
        (ZAMBA | {"n_mamba_heads": 3}, "n_mamba_heads=3: does not divide d_inner (7424)"),
        (ZAMBA | {"attention_hidden_size": 3712}, "attention_hidden_size=3712: is not 2 x hidden_size; legal: 7424"),
        (
            BAMBA | {"attn_layer_indices": [32]},
            "attn_layer_indices=[32]: are not layers; legal: a list of layers, 0 to 31",
        ),
        (
            FALCON_H1 | {"rope_parameters": {"rope_type": "yarn"}},
            "rope_type='yarn': is not implemented; legal: default",
        ),
        (
            FALCON_H1 | {"rope_parameters": {"partial_rotary_factor": 0.29}},
            "partial_rotary_factor=0.2890625: turns 37 channels; legal: an even number of channels, to 128",
        ),
        (FALCON_H1 | {"ssm_multipliers": [1, 2]}, "ssm_multipliers=[1, 2]: are not multipliers; legal: a list of 5"),
        (FALCON_H1 | {"hidden_act": "gelu"}, "hidden_act='gelu': is not implemented; legal: silu"),
    ],
)
def test_what_is_refused(raw, message):
    with pytest.raises(UserError) as caught:
        legal_tp_sizes(read_config(raw))
    assert message in str(caught.value)


def test_linear_rope_scaling_stretches_positions():
    old = read_config(FALCON_H1 | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    new = read_config(FALCON_H1 | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}})
    assert old.attention.rotary == RotaryConfig(1e11, 128, 4.0) and new.attention.rotary == RotaryConfig(5e5, 128, 4.0)


def test_linear_rope_scaling_is_hugging_faces(world, tiny):
    model = tiny("falcon_h1", rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0})
    ids = list(range(60))
    with torch.no_grad():
        expected = model.hf(torch.tensor([ids])).logits[0].numpy()
    for logits in world(2).run(jobs.logits, model.path, ids):
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_zamba2_with_the_block_under_every_layer_that_calls_it(tiny, tmp_path):
    """As Zyphra's files have it; Hugging Face's own writer stores it once."""
    path = copy_of(tiny("zamba2").path, tmp_path)
    before = open_model(path).sources

    def repeat(tensors: dict) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.shared_transformer.")]:
            tensors[name.replace("layers.1.", "layers.4.")] = tensors[name].clone()  # the third call, of block 0 again

    edit_tensors(path, repeat)
    assert open_model(path).sources == before
    edit_tensors(path, lambda tensors: tensors.update({"model.layers.4.shared_transformer.surprise": torch.ones(2)}))
    with pytest.raises(UserError, match=r"layers.4.shared_transformer.surprise.* is not part of this zamba2 model"):
        open_model(path)


def test_nemotron_h_under_either_name(world, tiny, tmp_path):
    """NVIDIA's files and Hugging Face's writer say backbone; in memory it is model."""
    model = tiny("nemotron_h", tied=False)
    tensors = load_file(model.path / "model.safetensors")
    other = {name.replace("backbone.", "model.", 1): tensor for name, tensor in tensors.items()}
    assert other.keys() != tensors.keys()
    (tmp_path / "config.json").write_text((model.path / "config.json").read_text())
    save_file(other | {"mtp.layers.0.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    expected = world(2).run(jobs.logits, model.path, [1, 2, 3])[0]
    for logits in world(2).run(jobs.logits, tmp_path, [1, 2, 3]):
        assert np.array_equal(logits, expected)


def test_untied_zamba_shares_no_block(world, tiny):
    """Hugging Face ties blocks with the embeddings, or not at all."""
    model, ids = tiny("zamba", tied=False), list(range(30))
    assert open_model(model.path).config.shared.count == 3
    with torch.no_grad():
        expected = model.hf(torch.tensor([ids])).logits[0].numpy()
    for logits in world(2).run(jobs.logits, model.path, ids):
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("model.layers.0.mamba.x_proj_weight", "is missing from the checkpoint; legal: shape [2, 13, 44]"),
        (
            "model.layers.1.shared_transf.self_attn.k_proj.weight",
            "is missing from the checkpoint; legal: shape [88, 88]",
        ),
    ],
)
def test_tensors_that_are_missing_are_named_as_the_file_names_them(tiny, tmp_path, drop, message):
    path = copy_of(tiny("zamba").path, tmp_path)
    edit_tensors(path, lambda tensors: tensors.pop(drop))
    with pytest.raises(UserError) as caught:
        open_model(path)
    assert drop in str(caught.value) and message in str(caught.value)


def test_a_misshapen_head_is_refused(tiny, tmp_path):
    path = copy_of(tiny("zamba").path, tmp_path)
    name = "model.layers.0.mamba.A_log"
    edit_tensors(path, lambda tensors: tensors.update({name: tensors[name].flatten(0, 1)}))
    with pytest.raises(UserError, match=r"A_log='?.*has shape \[88, 5\]; legal: \[2, 44, 5\]|has shape \[88, 5\]"):
        open_model(path)


def test_clamped_dt_is_clamped_in_every_step(world, tiny, tmp_path):
    """Hugging Face clamps dt in its scan and forgets it in its one-token step. Here a token decoded is a token read:
    with nearly every dt below the limit, decoding gives what Hugging Face gives when it reads everything anew."""
    model = tiny("zamba2", time_step_min=1.5)
    prompt = list(range(20))
    expected = model.greedy(prompt, 12, use_cache=False)
    assert model.greedy(prompt, 12) != expected
    for [answer] in world(2).run(jobs.greedy, model.path, [prompt], 12):
        assert answer == expected
