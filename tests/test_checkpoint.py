"""Reading checkpoints: every format gives the same model, a tensor at a time; every damage gives one clear line."""

import json
import shutil
import threading
import time
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ssm_tp.checkpoint.families import find_family
from megatron_ssm_tp.checkpoint.loader import load_parameters, open_model
from megatron_ssm_tp.config import ModelConfig
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.partition.layout import model_parameters


def copy_of(path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder / "checkpoint"))


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config = {name: value for name, value in (config | changes).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, change) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def read_config(raw: dict) -> ModelConfig:
    return find_family(raw).config(raw)


# Formats


def as_sharded_safetensors(model, folder: Path) -> None:
    model.hf.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()


def as_torch_file(model, folder: Path) -> None:
    shutil.copy(model.path / "config.json", folder)
    torch.save(load_file(model.path / "model.safetensors"), folder / "pytorch_model.bin")


def as_sharded_torch_files(model, folder: Path) -> None:
    shutil.copy(model.path / "config.json", folder)
    tensors = load_file(model.path / "model.safetensors")
    parts = {"pytorch_model-1.bin": list(tensors)[::2], "pytorch_model-2.bin": list(tensors)[1::2]}
    for file, names in parts.items():
        torch.save({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def as_state_spaces(model, folder: Path) -> None:
    """The originals: no model_type, "embedding", a tied copy of it as lm_head, d_model and n_layer."""
    tensors = load_file(model.path / "model.safetensors")
    embedding = tensors.pop("backbone.embeddings.weight")
    tensors |= {"backbone.embedding.weight": embedding, "lm_head.weight": embedding}
    torch.save(tensors, folder / "pytorch_model.bin")
    ssm = {"d_state": 5, "expand": 2}
    config = {"d_model": 44, "n_layer": 3, "vocab_size": 99, "ssm_cfg": ssm, "pad_vocab_size_multiple": 101}
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm": True, "residual_in_fp32": True}))


@pytest.mark.parametrize(
    "write", [as_sharded_safetensors, as_torch_file, as_sharded_torch_files, as_state_spaces], ids=lambda f: f.__name__
)
def test_every_format_is_the_same_model(world, tiny, tmp_path, write):
    model, ids = tiny("mamba"), [3, 1, 4, 1, 5]
    write(model, tmp_path)
    expected = world(2).run(jobs.logits, model.path, ids)[0]
    for logits in world(2).run(jobs.logits, tmp_path, ids):
        assert np.array_equal(logits, expected)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_loading_holds_one_share_and_one_tensor(tmp_path, suffix):
    """Resident private memory while one rank of four loads: its share, and never more than one tensor beside it."""
    config = {"model_type": "mamba", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    config |= {"vocab_size": 1000, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parsed = read_config(config)
    family = find_family(config)
    table = model_parameters(parsed)
    tensors = {family.find(name, parsed).names[0]: torch.randn(p.shape) for name, p in table.items()}
    if suffix == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    whole = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    expected = tensors["backbone.layers.5.mixer.in_proj.weight"][[2048, 4096 + 2048]].clone()
    del tensors

    targets = {name: torch.empty(p.local_shape(4)) for name, p in model_parameters(parsed).items()}
    share = sum(target.nbytes for target in targets.values())
    growth = peak_growth(lambda: load_parameters(targets, open_model(tmp_path), rank=2, tp=4))
    assert growth < share + largest < whole / 2
    assert torch.equal(targets["decoder.layers.5.mixer.in_proj.weight"][[0, 1024]], expected)


def peak_growth(work) -> int:
    """Bytes by which this process's private memory grew at most while `work` ran, sampled every millisecond."""

    def resident() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
        return int(line.split()[1]) * 1024

    before, seen, over = resident(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.append(resident())
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    over.set()
    watcher.join()
    return max(*seen, resident()) - before


# config.json: traps of real checkpoints


def test_falcon_mamba_7b_config():
    """tiiuae/falcon-mamba-7b: expand says 16, intermediate_size is right."""
    raw = {"model_type": "falcon_mamba", "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024}
    raw |= {"expand": 16, "intermediate_size": 8192, "state_size": 16, "time_step_rank": 256, "conv_kernel": 4}
    raw |= {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 11, "layer_norm_epsilon": 1e-5}
    config = read_config(raw)
    assert config.mixer.d_inner == 8192 and config.mixer.dt_rank == 256 and config.mixer.bcdt_norm_eps == 1e-6
    assert (config.tied_embeddings, config.dtype, config.eos_token_ids) == (False, "bfloat16", (11,))


def test_mamba_2_8b_hf_config():
    """state-spaces/mamba-2.8b-hf: dt_rank and d_inner follow from the hidden size."""
    raw = {"model_type": "mamba", "hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50280}
    config = read_config(raw | {"time_step_rank": "auto", "expand": 2, "torch_dtype": "float32"})
    assert (config.mixer.d_inner, config.mixer.dt_rank, config.mixer.bcdt_norm_eps) == (5120, 160, None)
    assert config.tied_embeddings


def test_state_spaces_original_config():
    """state-spaces/mamba-2.8b: the vocabulary in the file is padded, the config's is not."""
    raw = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
    config = read_config(raw | {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8})
    assert (config.vocab_size, config.mixer.d_inner, config.mixer.dt_rank) == (50280, 5120, 160)


def test_several_end_of_text_ids():
    raw = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 9, "eos_token_id": [3, 4]}
    assert read_config(raw).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama': is not a supported family; legal: mamba, falcon_mamba, mamba2"),
        ({"model_type": ...}, "model_type=None: is not a supported family; legal: mamba, falcon_mamba, mamba2"),
        ({"hidden_size": ...}, "hidden_size=None: is missing; legal: a positive integer"),
        ({"hidden_size": "44"}, "hidden_size='44': is not a positive integer; legal: a positive integer"),
        ({"vocab_size": -3}, "vocab_size=-3: is not a positive integer"),
        ({"use_bias": 1}, "use_bias=1: is not true or false; legal: true or false"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon=-1: is not a positive number; legal: a positive number"),
        ({"intermediate_size": ..., "expand": -2}, "expand=-2: is not a positive number"),
        ({"time_step_rank": 0}, "time_step_rank=0: is not a positive integer"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': is not implemented; legal: silu"),
        ({"dtype": "int8"}, "dtype='int8': cannot be run; legal: float32, bfloat16, float16"),
        ({"eos_token_id": "end"}, "eos_token_id='end': is not a token id"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_config(tiny, tmp_path, changes, message):
    path = copy_of(tiny("mamba").path, tmp_path)
    edit_config(path, **changes)
    with pytest.raises(UserError) as error:
        open_model(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ssm", "message"),
    [
        ({"d_state": "x"}, "d_state='x': is not a positive integer"),
        ({"expand": "2"}, "expand='2': is not a positive number"),
        ({"layer": "Mamba3"}, "ssm_cfg.layer='Mamba3': is not implemented; legal: Mamba1, Mamba2"),
        ({"layer": "Mamba2", "dt_limit": [1]}, "dt_limit=[1]: is not a range; legal: two numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_state_spaces_config(ssm, message):
    with pytest.raises(UserError) as error:
        read_config({"d_model": 64, "n_layer": 2, "vocab_size": 100, "ssm_cfg": ssm})
    assert message in str(error.value)


# Damaged files


def test_missing_extra_and_misshapen_tensors(tiny, tmp_path):
    path = copy_of(tiny("mamba").path, tmp_path)
    name = "backbone.layers.1.mixer.D"
    edit_tensors(path, lambda tensors: tensors.update({name: torch.ones(87)}))
    with pytest.raises(UserError, match=rf"tensor='{name}': has shape \[87\]; legal: \[88\], from config.json"):
        open_model(path)
    edit_tensors(path, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=rf"tensor='{name}': is missing from the checkpoint; legal: shape \[88\]"):
        open_model(path)
    edit_tensors(
        path, lambda tensors: tensors.update({name: torch.ones(88), "backbone.layers.3.mixer.D": torch.ones(88)})
    )
    with pytest.raises(UserError, match=r"tensor='backbone.layers.3.mixer.D': is not part of this mamba model"):
        open_model(path)


def test_a_tied_head_may_be_there(tiny, tmp_path):
    path = copy_of(tiny("mamba").path, tmp_path)
    edit_tensors(path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(101, 44)}))
    assert "output_layer.weight" not in open_model(path).sources


def cut_in_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "is not a directory; legal: a directory with config.json and weights"),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "config.json': cannot be read"),
        (lambda path: (path / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda path: (path / "model.safetensors").unlink(), "has no weights; legal: model.safetensors or"),
        (lambda path: cut_in_half(path / "model.safetensors"), "model.safetensors': cannot be read"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors': cannot be read"),
    ],
    ids=["no directory", "no config", "half a config", "a list", "no weights", "truncated", "empty"],
)
def test_damaged_directories(tiny, tmp_path, damage, message):
    path = copy_of(tiny("mamba").path, tmp_path)
    damage(path)
    with pytest.raises(UserError) as error:
        open_model(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_damaged_torch_files_and_indices(tiny, tmp_path):
    as_torch_file(tiny("mamba"), tmp_path)
    cut_in_half(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin': cannot be read"):
        open_model(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    as_sharded_torch_files(tiny("mamba"), tmp_path)
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-2.bin': is named by the index but missing"):
        open_model(tmp_path)
    for index in ("{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}'):
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
        with pytest.raises(UserError, match="has no weight_map"):
            open_model(tmp_path)


def test_integer_tensors_are_refused(tiny, tmp_path):
    """A checkpoint quantized to int8 must not be read as if its codes were weights."""
    path, name = copy_of(tiny("mamba").path, tmp_path), "backbone.layers.0.mixer.in_proj.weight"
    edit_tensors(path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(UserError, match=f"tensor='{name}': has dtype I8; legal: float32, bfloat16, float16"):
        open_model(path)
