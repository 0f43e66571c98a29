"""What ranks are asked to do: functions that run on every rank of a `Ranks` pool and return plain data."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_ssm_tp import LLM, CacheLimits, SamplingParams
from megatron_ssm_tp.checkpoint.loader import load_parameters, open_model
from megatron_ssm_tp.compat.cpu import megatron_on_cpu
from megatron_ssm_tp.inference.distributed import tensor_parallel_groups
from megatron_ssm_tp.inference.requests import Limits, Request, read_params
from megatron_ssm_tp.inference.running import Bursts
from megatron_ssm_tp.inference.stopping import StopCondition
from megatron_ssm_tp.inference.tokenizer import NoTokenizer
from megatron_ssm_tp.layers.model import SSMModel, build_model


@lru_cache(maxsize=2)
def llm(path: Path, dtype: str = "float32", engine: str = "auto", bursts: Bursts | None = None, **limits: int) -> LLM:
    return LLM.from_pretrained(path, dtype=dtype, limits=CacheLimits(**limits), engine=engine, bursts=bursts)


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


def linears_given_gaps(path: Path, token_ids: list[int]) -> set[str]:
    """Linears that a prompt reaches as rows with gaps between them: torch multiplies those one by one."""
    found = set()

    def noting(name: str, product: Callable) -> Callable:
        def multiply(*args, **kwargs):
            x = kwargs["input"]
            if x.dim() > 2 and not x.is_contiguous():
                found.add(name)
            return product(*args, **kwargs)

        return multiply

    with ExitStack() as stack:
        for name, module in llm(path).model.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                product = noting(name, module._forward_impl)
                stack.enter_context(mock.patch.object(module, "_forward_impl", product))
        llm(path).logits(token_ids)
    return found


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


def states_after(
    path: Path,
    prompt: list[int],
    chunk: int,
    steps: int,
    company: list[int] | None = None,
    engine_name: str = "auto",
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Prefill `prompt` in steps of at most `chunk` tokens, decode `steps` tokens more; the request's states then.

    The shorter prompt `company` takes its tokens of the first step, and goes on when the other is over.
    """
    engine = llm(path, engine=engine_name, max_requests=4, max_tokens=chunk).engine
    params = SamplingParams(num_tokens_to_generate=steps, termination_id=-1)
    # The last step's token is sampled but not fed back: the states are those after prompt and steps - 1 tokens.
    longer = SamplingParams(num_tokens_to_generate=steps + 8, termination_id=-1)
    limits, own = Limits(101, 1024), type(engine).__name__ == "SlotEngine"
    each = [(company, longer)] if company else []
    requests = [
        Request(ids, read_params(wanted, len(ids), limits, own), NEVER) for ids, wanted in [*each, (prompt, params)]
    ]
    tokens = [progress.token_ids for progress in engine.run(requests) if progress.index == len(requests) - 1][-1]
    if own:
        used = engine.free_slots[-len(requests)]  # freed last, or before its company's; not yet cleared
        return tokens, engine.table.conv[:, used].numpy().copy(), engine.table.ssm[:, used].numpy().copy()
    context = engine.context
    slots = context.mamba_metadata
    used = int(slots.mamba_state_free_slots[slots.mamba_state_free_slot_count - len(requests)])
    return tokens, context.mamba_conv_states[:, used].numpy().copy(), context.mamba_ssm_states[:, used].numpy().copy()


def engine_of(path: Path) -> str:
    return type(llm(path).engine).__name__


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


def greedy_of_arrays(path: Path, prompt: list[int], count: int) -> list[list[int]]:
    return greedy(path, [np.array(prompt), torch.tensor(prompt)], count)


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


def logits_beside_a_stream(path: Path, prompt: list[int]) -> tuple[str, str]:
    """What logits says while a stream is open, and generate after close."""
    from megatron_ssm_tp import UserError

    model, said = LLM.from_pretrained(path, dtype="float32"), []
    stream = model.stream([prompt], SamplingParams(temperature=0, num_tokens_to_generate=5, termination_id=-1))
    next(stream)
    for call in (lambda: model.logits(prompt), lambda: model.generate([prompt])):
        try:
            call()
        except UserError as error:
            said.append(str(error))
        stream.close()
        model.close()
    return said[0], said[1]


def sampled_around_streams(path: Path, prompt: list[int]) -> list[list[int]]:
    """The answer of seed 1 alone, and when a stream of seed 2 was asked for before it was begun."""
    model, params = llm(path), SamplingParams(temperature=1.0, num_tokens_to_generate=20, termination_id=-1)
    alone = model.generate([prompt], params, seed=1)[0].token_ids
    first, _ = model.stream([prompt], params, seed=1), model.stream([prompt], params, seed=2)
    return [alone, [token for piece in first for token in piece.token_ids]]


def shared_rows_after_initialization(groups_count: int) -> list[np.ndarray]:
    """B's rows of in_proj and of the convolution, drawn as on GPUs: from a generator of each rank's own."""
    from types import SimpleNamespace
    from unittest import mock

    from megatron_ssm_tp.config import Mamba2Config
    from megatron_ssm_tp.layers import initialization
    from megatron_ssm_tp.partition.parameters import mamba2_parameters

    group, dims = groups().tp, Mamba2Config(8, 4, groups_count, 5, 4, None)
    table = mamba2_parameters(dims, 12)
    parameters = {name: torch.zeros(p.local_shape(group.size())) for name, p in table.items()}
    torch.manual_seed(100 + group.rank())
    tracker = SimpleNamespace(fork=nullcontext)
    config = SimpleNamespace(use_cpu_initialization=False, init_method=torch.nn.init.normal_)
    with mock.patch.object(initialization, "get_cuda_rng_tracker", lambda: tracker):
        initialization.initialize_mamba2(parameters, table, dims, config, group)
    own = 32 // group.size()
    size = 5 * max(1, groups_count // group.size())
    return [
        parameters["in_proj.weight"][2 * own : 2 * own + size].numpy(),
        parameters["conv1d_weight"][own : own + size].numpy(),
    ]


def greedy_in_a_loop_on_one_rank(path: Path, prompt: list[int], count: int) -> list[list[int]]:
    """Within allreduce_autocast, where only rank 0 calls from a running event loop: Megatron's step takes a thread."""
    import asyncio

    from megatron_ssm_tp import Int8BlockScaling, allreduce_autocast

    model = llm(path)

    async def ask() -> list[list[int]]:
        return greedy(path, [prompt], count)

    with allreduce_autocast(recipe=Int8BlockScaling(block_size=16)):
        return asyncio.run(ask()) if model.model.pg_collection.tp.rank() == 0 else greedy(path, [prompt], count)


def greedy_by_recipe(path: Path, prompts: list, count: int, recipe: object) -> list[list[int]]:
    params = SamplingParams(temperature=0, num_tokens_to_generate=count, termination_id=-1)
    with LLM.from_pretrained(path, dtype="float32", tp_allreduce=recipe) as model:
        return [output.token_ids for output in model.generate(prompts, params)]
