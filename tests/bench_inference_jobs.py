"""What ranks are asked about the tools that time whole models and operators."""

import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import bench_inference as bench
import bench_models
import bench_shapes
import decode_bench
import inference_report
import measure
import prefill_bench

from megatron_ssm_tp.compat.cpu import megatron_on_cpu
from megatron_ssm_tp.inference.distributed import tensor_parallel_groups

CPU = torch.device("cpu")
FALCON = {
    "model_type": "falcon_mamba",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "state_size": 4,
    "vocab_size": 101,
    "tie_word_embeddings": False,
}
MAMBA2 = {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 101,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 8},
    "pad_vocab_size_multiple": 16,
}
ZAMBA2 = {
    "model_type": "zamba2",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "n_mamba_heads": 8,
    "mamba_headdim": 8,
    "mamba_ngroups": 2,
    "mamba_d_state": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "num_mem_blocks": 2,
    "adapter_rank": 3,
    "use_mem_rope": True,
    "vocab_size": 101,
}


def prefill_error(raw: dict, layers: int | None, batch: int, length: int, passes: str) -> float:
    """How far the benchmark's second pass, in float32, is from each prompt's own forward pass, without a context."""
    config, _ = bench_shapes.read_model(raw, layers)
    ours = bench_models.Ours(config, tensor_parallel_groups(None), CPU, torch.float32, length)
    passing = {"whole": ours.prefill, "engine": ours.engine_pass}[passes](batch, length)
    passing.run()
    passing.refresh()
    found, positions, errors = passing.run(), torch.arange(length)[None], []
    assert found.shape == (batch, config.vocab_size)
    with torch.no_grad(), megatron_on_cpu():
        for prompt, logits in zip(bench_models.draw_tokens(batch, length, config.vocab_size), found, strict=True):
            alone = ours.model(prompt[None], positions, None, runtime_gather_output=True)[0, -1]
            errors.append(((logits - alone).norm() / alone.norm()).item())
    return max(errors)


def benched(raw: dict, arguments: list[str]) -> tuple[list[inference_report.Cell], list[str]]:
    """The cells and the notes of a model's benchmark."""
    with mock.patch.dict(bench_shapes.MODELS, {"tiny": raw}):
        args = bench.read_args(["prefill", "--models", "tiny", *arguments])
        asked = bench.check(args, 2)
    setting = bench.Setting(args, asked, tensor_parallel_groups(None), CPU, {})
    made, cells = prefill_bench.PrefillBench("tiny", setting), []
    with mock.patch.object(measure, "PASS_SECONDS", 0.01):
        made.run(cells)
    return inference_report.with_ratios(cells), made.notes


def steps(raw: dict, arguments: list[str]) -> list[decode_bench.DecodeCell]:
    """What bench_inference.py decode measures."""
    cells: list[decode_bench.DecodeCell] = []
    with mock.patch.dict(bench_shapes.MODELS, {"tiny": raw}):
        args = bench.read_args(["decode", "--models", "tiny", *arguments])
        groups = tensor_parallel_groups(None)
        asked = bench.check(args, groups.tp.size())
        decode_bench.DecodeBench("tiny", bench.Setting(args, asked, groups, CPU, {}), 1e10).run(cells)
    return cells
