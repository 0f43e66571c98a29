"""Row-parallel products taken apart: the partial sums of a rank, and their reduction."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


def partial_product(linear: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
    """This rank's part of linear(x), bias left out: x [.., d/p] -> [.., h], to be summed over the ranks."""
    return linear_with_grad_accumulation_and_async_allreduce(
        input=x,
        weight=linear.weight,
        bias=None,
        gradient_accumulation_fusion=linear.config.gradient_accumulation_fusion,
        allreduce_dgrad=False,
        sequence_parallel=False,
    )


def reduce_partial(partial: torch.Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> torch.Tensor:
    """The sum over the ranks: [l, b, h], or [l/p, b, h] under sequence parallelism."""
    if sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(partial, group=group)
    return reduce_from_tensor_model_parallel_region(partial, group=group)
