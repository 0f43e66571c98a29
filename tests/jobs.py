"""What ranks are asked to do: functions that run on every rank of a `Ranks` pool and return plain data."""

from collections.abc import Iterator
from contextlib import contextmanager
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
from megatron_ssm_tp.inference.engine import Request
from megatron_ssm_tp.inference.stopping import StopCondition
from megatron_ssm_tp.inference.tokenizer import NoTokenizer
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


NEVER = StopCondition(frozenset(), (), False, NoTokenizer(Path(), 101, -1))


def states_after(path: Path, prompt: list[int], chunk: int, steps: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Prefill `prompt` in chunks of at most `chunk` tokens, decode `steps` tokens more; the request's states then."""
    engine = llm(path, max_requests=4, max_tokens=chunk).engine
    params = SamplingParams(top_k=1, num_tokens_to_generate=steps, termination_id=-1)
    # The last step's token is sampled but not fed back: the states are those after prompt and steps - 1 tokens.
    tokens = [progress.token_ids for progress in engine.run([Request(prompt, params, NEVER)])][-1]
    context = engine.context
    slots = context.mamba_metadata
    used = int(slots.mamba_state_free_slots[slots.mamba_state_free_slot_count - 1])  # freed last, not yet cleared
    return tokens, context.mamba_conv_states[:, used].numpy().copy(), context.mamba_ssm_states[:, used].numpy().copy()


@contextmanager
def collectives_recorded(group: torch.distributed.ProcessGroup) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Every collective that `group` is asked for, by its backend's own name, with the shape of its first tensor.

    The group's class is wrapped, below all that Python code may have imported under another name.
    """
    sent: list[tuple[str, tuple[int, ...]]] = []
    kind = torch.distributed.ProcessGroup
    names = [name for name in dir(kind) if name.lstrip("_").startswith(_COLLECTIVES) and callable(getattr(kind, name))]
    saved = {name: getattr(kind, name) for name in names}

    def recorded(name: str):
        def call(self, *args, **kwargs):
            tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
            while tensors and isinstance(tensors[0], list):
                tensors = tensors[0]
            shape = next((tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)), ())
            sent.append((name, shape))
            return saved[name](self, *args, **kwargs)

        return call

    for name in names:
        setattr(kind, name, recorded(name))
    try:
        yield sent
    finally:
        for name in names:
            setattr(kind, name, saved[name])


# prefixes: methods come in variants, such as allreduce_coalesced and _allgather_base
_COLLECTIVES = (
    "allreduce",
    "allgather",
    "all_gather",
    "reduce",
    "alltoall",
    "broadcast",
    "gather",
    "scatter",
    "send",
    "recv",
    "barrier",
)


def collectives_of_steps(path: Path, prompts: list[list[int]], count: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """For each forward pass of a generation, what the decoder's layers sent."""
    model = llm(path)
    passes: list[list[tuple[str, tuple[int, ...]]]] = []
    with collectives_recorded(model.model.pg_collection.tp) as sent:

        def enter(*_) -> None:
            sent.clear()

        def leave(*_) -> None:
            passes.append(list(sent))

        decoder = model.model.decoder
        hooks = [decoder.register_forward_pre_hook(enter), decoder.register_forward_hook(leave)]
        try:
            model.generate(prompts, SamplingParams(temperature=0, num_tokens_to_generate=count, termination_id=-1))
        finally:
            for hook in hooks:
                hook.remove()
    return passes


def collectives_of_megatrons_mappings() -> list[str]:
    """What the recorder sees of Megatron's own gather, reduce-scatter and reduce, called on purpose."""
    from megatron.core.tensor_parallel import mappings

    group, x = groups().tp, torch.ones(4, 1, 4)
    with megatron_on_cpu(), collectives_recorded(group) as sent:
        mappings.gather_from_tensor_model_parallel_region(x, group=group)
        mappings.reduce_scatter_to_sequence_parallel_region(x, group=group)
        mappings.reduce_from_tensor_model_parallel_region(x, group=group)
        torch.distributed.broadcast(x, 0, group=group)
    return [name for name, _ in sent]


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

    sampling: object = SamplingParams(**(params or {})) if not isinstance(params, list) else None
    if isinstance(params, list):
        sampling = [None if p is None else SamplingParams(**p) for p in params]
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


def two_streams(path: Path, prompt: list[int]) -> tuple[str, list[int], list[int]]:
    """A generation asked for in the middle of a stream: its error, what the stream still gives, and one after it."""
    from megatron_ssm_tp import UserError

    model, params = llm(path), SamplingParams(temperature=0, num_tokens_to_generate=6, termination_id=-1)
    stream = model.stream([prompt], params)
    tokens = list(next(stream).token_ids)
    try:
        model.generate([prompt], params)
        message = "no error"
    except UserError as error:
        message = str(error)
    tokens += [token for piece in stream for token in piece.token_ids]
    return message, tokens, model.generate([prompt], params)[0].token_ids


def error_of_text(path: Path, tokenizer: Path, text: str) -> str:
    from megatron_ssm_tp import UserError

    try:
        LLM.from_pretrained(path, tokenizer=tokenizer).generate([text])
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def greedy_of_arrays(path: Path, prompt: list[int], count: int) -> list[list[int]]:
    return greedy(path, [np.array(prompt), torch.tensor(prompt)], count)


def agree_on_a_bug() -> str:
    from megatron_ssm_tp.ranks import agree

    group = groups().tp

    def step() -> None:
        if group.rank() == 1:
            raise KeyError("x")

    try:
        agree(step, group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def generate_in_a_loop_and_in_threads(path: Path, prompt: list[int]) -> list[object]:
    """Answers from a running event loop, from another after it, from a thread; and of two threads at once."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    params = SamplingParams(temperature=0, num_tokens_to_generate=5, termination_id=-1)

    async def build() -> LLM:
        return LLM.from_pretrained(path, dtype="float32")

    async def ask(model: LLM) -> list[int]:
        return model.generate([prompt], params)[0].token_ids

    async def ask_thread(model: LLM) -> list[int]:
        return (await asyncio.to_thread(model.generate, [prompt], params))[0].token_ids

    model = asyncio.run(build())
    found = [asyncio.run(ask(model)), asyncio.run(ask_thread(model)), model.generate([prompt], params)[0].token_ids]
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(model.generate, [prompt], params) for _ in range(2)]
    kinds = sorted(type(a.exception()).__name__ for a in asked)
    return [*found, kinds]


def streamed(path: Path, prompt: str, params: dict) -> tuple[str, str]:
    """What a stream shows piece by piece, and the final text."""
    pieces = list(llm(path).stream([prompt], SamplingParams(**params)))
    return "".join(piece.text for piece in pieces), pieces[-1].output.text
