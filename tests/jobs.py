"""What ranks are asked to do: functions that run on every rank of a `Ranks` pool and return plain data."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ssm_tp import LLM, CacheLimits, SamplingParams
from megatron_ssm_tp.checkpoint.loader import load_parameters, open_model
from megatron_ssm_tp.compat.cpu import megatron_on_cpu
from megatron_ssm_tp.inference.distributed import tensor_parallel_groups
from megatron_ssm_tp.layers.model import SSMModel, build_model


@lru_cache(maxsize=2)
def llm(path: Path, dtype: str = "float32", **limits: int) -> LLM:
    return LLM.from_pretrained(path, dtype=dtype, limits=CacheLimits(**limits))


def groups() -> ProcessGroupCollection:
    return tensor_parallel_groups(None)


def build(path: Path, dtype: torch.dtype = torch.float32, *, load: bool = True, **overrides) -> SSMModel:
    """A model outside any engine, loaded from `path`."""
    checkpoint, pg = open_model(path), groups()
    with megatron_on_cpu():
        model = build_model(checkpoint.config, pg, dtype, torch.device("cpu"), 256, **overrides)
    if load:
        load_parameters(dict(model.named_parameters()), checkpoint, pg.tp.rank(), pg.tp.size())
    return model


def logits(path: Path, token_ids: list[int], dtype: str = "float32") -> np.ndarray:
    return llm(path, dtype).logits(token_ids).numpy()


def greedy(path: Path, prompts: list, count: int, **limits: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, num_tokens_to_generate=count, termination_id=-1)
    return [output.token_ids for output in llm(path, **limits).generate(prompts, params)]


def gradients(path: Path, tokens: list[list[int]], labels: list[list[int]], **overrides) -> dict[str, np.ndarray]:
    """Each parameter's gradient on this rank, of the mean loss, under "loss" the loss itself."""
    model = build(path, **overrides).train()
    ids, targets = torch.tensor(tokens), torch.tensor(labels)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with megatron_on_cpu():
        loss = model(ids, positions, None, labels=targets).mean()
        loss.backward()
    if overrides.get("sequence_parallel"):
        _sum_sequence_parallel_gradients(model)
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return found | {"loss": loss.detach().numpy()}


def _sum_sequence_parallel_gradients(model: SSMModel) -> None:
    """What Megatron's finalize_model_grads does for parameters that saw only this rank's part of the sequence."""
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())


def generate(path: Path, prompts: list, params: dict, seed: int | None = None, **limits: int) -> list[dict]:
    """LLM.generate with SamplingParams(**params); outputs as dicts."""
    outputs = llm(path, **limits).generate(prompts, SamplingParams(**params), seed=seed)
    return [vars(output) for output in outputs]


def states_after(path: Path, prompt: list[int], chunk: int, steps: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Prefill `prompt` in chunks of at most `chunk` tokens, decode `steps` tokens more; the request's states then."""
    engine = llm(path, max_requests=4, max_tokens=chunk).engine
    params = SamplingParams(top_k=1, num_tokens_to_generate=steps, termination_id=-1)
    engine.add(prompt, params)
    # The last step's token is sampled but not fed back: the states are those after prompt and steps - 1 tokens.
    tokens = [progress.token_ids for progress in engine.run()][-1]
    context = engine.context
    slots = context.mamba_metadata
    used = int(slots.mamba_state_free_slots[slots.mamba_state_free_slot_count - 1])  # freed last, not yet cleared
    return tokens, context.mamba_conv_states[:, used].numpy().copy(), context.mamba_ssm_states[:, used].numpy().copy()


def collectives_of_a_step(path: Path, prompts: list[list[int]], count: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """For each forward pass of a generation, every collective of the decoder's layers: its name and tensor shape."""
    import torch.distributed as dist

    model = llm(path)
    passes: list[list[tuple[str, tuple[int, ...]]]] = []
    inside = False

    def enter(*_) -> None:
        nonlocal inside
        inside = True
        passes.append([])

    def leave(*_) -> None:
        nonlocal inside
        inside = False

    def recorded(name: str):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            if inside:
                tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
                passes[-1].append((name, tuple(tensor.shape)))
            return original(*args, **kwargs)

        return original, call

    names = [name for name in _COLLECTIVES if hasattr(dist, name)]
    saved = {}
    for name in names:
        saved[name], wrapper = recorded(name)
        setattr(dist, name, wrapper)
    hooks = [model.model.decoder.register_forward_pre_hook(enter), model.model.decoder.register_forward_hook(leave)]
    try:
        model.generate(prompts, SamplingParams(temperature=0, num_tokens_to_generate=count, termination_id=-1))
    finally:
        for hook in hooks:
            hook.remove()
        for name in names:
            setattr(dist, name, saved[name])
    return passes


_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
    "barrier",
)


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

    from megatron_ssm_tp.inference.engine import megatron_inference

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


def train_from_spec(name: str, steps: int) -> list[float]:
    """Losses of a model built as Megatron's launch scripts build it: `--spec megatron_ssm_tp.layers.specs NAME`."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import import_module

    pg = groups()
    with megatron_on_cpu():
        torch.manual_seed(0)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=40,
            num_attention_heads=4,
            mamba_state_dim=8,
            normalization="RMSNorm",
            add_bias_linear=False,
            hidden_dropout=0.0,
            use_cpu_initialization=True,
            tensor_model_parallel_size=pg.tp.size(),
            bias_dropout_fusion=False,
        )
        model = HybridModel(
            config=config,
            hybrid_stack_spec=import_module(["megatron_ssm_tp.layers.specs", name]),
            vocab_size=64,
            max_sequence_length=64,
            hybrid_layer_pattern="MM",
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
    context = llm(path, "bfloat16").engine.context
    return found | {"conv": str(context.mamba_conv_states.dtype), "ssm": str(context.mamba_ssm_states.dtype)}


def cache_bytes(path: Path, **limits: int) -> dict[str, int]:
    """What the dynamic context allocated: attention cache and states, and its number of slots."""
    context = llm(path, **limits).engine.context
    states = context.mamba_conv_states.nbytes + context.mamba_ssm_states.nbytes
    return {"phantom": context.memory_buffer.nbytes, "states": states, "slots": context.max_requests}


def error_of(path: Path, prompts: object, params: dict | list[dict] | None = None, **limits: int) -> str:
    """The message of the UserError that generating raises."""
    from megatron_ssm_tp import UserError

    sampling = [SamplingParams(**p) for p in params] if isinstance(params, list) else SamplingParams(**(params or {}))
    try:
        llm(path, **limits).generate(prompts, sampling)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def logits_error_of(path: Path, token_ids: list[int]) -> str:
    from megatron_ssm_tp import UserError

    try:
        llm(path).logits(token_ids)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def error_seen_by_one_rank(path: Path, missing_on: int) -> str:
    """Loading where one rank cannot see the checkpoint: what each rank raises."""
    from megatron_ssm_tp import UserError

    here = path if groups().tp.rank() != missing_on else path / "elsewhere"
    try:
        LLM.from_pretrained(here)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def state_between_calls(path: Path) -> list[bool]:
    """After loading, in the middle of a stream and after it: whether torch.cuda and Megatron's flag are untouched."""
    from megatron.core.inference.utils import InferenceMode

    def untouched() -> bool:
        return torch.cuda.Event.__module__.startswith("torch") and not InferenceMode.is_active()

    model = llm(path)
    found = [untouched()]
    stream = model.stream([[1, 2, 3]], SamplingParams(temperature=0, num_tokens_to_generate=5, termination_id=-1))
    next(stream)
    found.append(untouched())
    stream.close()
    model.generate([[1]], SamplingParams(temperature=0, num_tokens_to_generate=2, termination_id=-1))
    return [*found, untouched()]
