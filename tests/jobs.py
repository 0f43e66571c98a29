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
