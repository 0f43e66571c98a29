"""What ranks are asked to send, and a recorder of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jobs import groups, llm

from megatron_ssm_tp import SamplingParams
from megatron_ssm_tp.compat.cpu import megatron_on_cpu

Sent = tuple[str, tuple[int, ...], int]  # a collective's name, its tensor's shape, and how many ranks take part


@contextmanager
def collectives_recorded(group: torch.distributed.ProcessGroup) -> Iterator[list[Sent]]:
    """Every collective that `group` is asked for, by its backend's own name, with the shape of its first tensor.

    The group's class is wrapped, below all that Python code may have imported under another name.
    """
    sent: list[Sent] = []
    kind = torch.distributed.ProcessGroup
    names = [name for name in dir(kind) if name.lstrip("_").startswith(_COLLECTIVES) and callable(getattr(kind, name))]
    saved = {name: getattr(kind, name) for name in names}

    def recorded(name: str):
        def call(self, *args, **kwargs):
            tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
            while tensors and isinstance(tensors[0], list):
                tensors = tensors[0]
            shape = next((tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)), ())
            sent.append((name, shape, self.size()))
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


def collectives_of_steps(path: Path, prompts: list[list[int]], count: int, **limits: int) -> list[list[Sent]]:
    """For each forward pass of a generation, what the decoder's layers sent."""
    model = llm(path, **limits)
    passes: list[list[Sent]] = []
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
    return [name for name, *_ in sent]
