"""What ranks are asked to do with Megatron's own classes: engines, specs, checkpoints, casts."""

from pathlib import Path

import numpy as np
import torch
from jobs import build, groups, llm

from megatron_ssm_tp import SamplingParams
from megatron_ssm_tp.checkpoint.loader import open_model
from megatron_ssm_tp.compat.cpu import megatron_on_cpu


def save_torch_dist(path: Path, folder: Path) -> None:
    from megatron_ssm_tp.checkpoint.writer import save_torch_dist as save

    model = build(path)
    save(folder, model, open_model(path).config, groups())


def logits_from_torch_dist(path: Path, folder: Path, token_ids: list[int]) -> np.ndarray:
    """Build the model of `path`, fill it from `folder` alone, and run it."""
    from megatron_ssm_tp.checkpoint.writer import load_torch_dist

    model = build(path, load=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_torch_dist(folder, model, open_model(path).config, groups())
    ids = torch.tensor([token_ids])
    with torch.no_grad(), megatron_on_cpu():
        return model.eval()(ids, torch.arange(len(token_ids))[None], None, runtime_gather_output=True)[0].numpy()


def static_greedy(path: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Megatron's static engine on our model; prompts as text of numbers through a tokenizer that reads them."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    from megatron_ssm_tp.inference.megatron_engine import megatron_inference

    model = build(path).eval()
    with megatron_inference():
        context = StaticInferenceContext(max_batch_size=len(prompts), max_sequence_length=256)
        controller = TextGenerationController(GPTInferenceWrapper(model, context), NumberTokenizer())
        engine = StaticInferenceEngine(controller, legacy=True)
        params = SamplingParams(top_k=1, num_tokens_to_generate=count, termination_id=-1)
        results = engine.generate(prompts=[" ".join(map(str, prompt)) for prompt in prompts], sampling_params=params)
    return [[int(token) for token in result.generated_tokens] for result in results]


class NumberTokenizer:
    """'3 17' <-> [3, 17]"""

    vocab_size, eod, eos_id, bos, pad, unique_identifiers = 101, -1, -1, None, 0, None

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(int(token)) for token in ids)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        return [len(self.detokenize(ids[:i])) + (i > 0) for i in range(len(ids))]


def train_from_spec(name: str, steps: int, mamba_groups: int = 1, pattern: str = "MM", **options) -> list[float]:
    """Losses of a model built as Megatron's launch scripts build it: `--spec megatron_ssm_tp.layers.specs NAME`."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import import_module

    pg = groups()
    with megatron_on_cpu():
        torch.manual_seed(0)
        config = TransformerConfig(
            num_layers=len(pattern),
            hidden_size=40,
            num_attention_heads=4,
            num_query_groups=2,  # shared at 4 ranks
            mamba_state_dim=8,
            mamba_head_dim=10,
            mamba_num_groups=mamba_groups,
            normalization="RMSNorm",
            add_bias_linear=False,
            hidden_dropout=0.0,
            use_cpu_initialization=True,
            tensor_model_parallel_size=pg.tp.size(),
            bias_dropout_fusion=False,
            **{"attention_dropout": 0.0} | options,
        )
        model = HybridModel(
            config=config,
            hybrid_stack_spec=import_module(["megatron_ssm_tp.layers.specs", name]),
            vocab_size=64,
            max_sequence_length=64,
            hybrid_layer_pattern=pattern,
            share_embeddings_and_output_weights=True,
            pg_collection=pg,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
        losses = []
        for _ in range(steps):
            loss = model(ids[:, :-1], torch.arange(16).expand(2, -1), None, labels=ids[:, 1:]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def dtypes_in_bfloat16(path: Path) -> dict[str, str]:
    """Parameter dtypes after Megatron's own cast, and those of the states."""
    from megatron.core.transformer.module import Float16Module

    model = build(path, torch.bfloat16, bf16=True)
    before = model.decoder.layers[0].mixer.A_log.clone()
    model = Float16Module(model.config, model).module
    assert torch.equal(before, model.decoder.layers[0].mixer.A_log)
    found = {name: str(parameter.dtype) for name, parameter in model.named_parameters()}
    context = llm(path, "bfloat16", "megatron").engine.context
    return found | {"conv": str(context.mamba_conv_states.dtype), "ssm": str(context.mamba_ssm_states.dtype)}


def cache_bytes(path: Path, **limits: int) -> dict[str, int]:
    """What the dynamic context allocated: attention cache and states, and its number of slots."""
    context = llm(path, engine="megatron", **limits).engine.context
    states = context.mamba_conv_states.nbytes + context.mamba_ssm_states.nbytes
    return {"phantom": context.memory_buffer.nbytes, "states": states, "slots": context.max_requests}
