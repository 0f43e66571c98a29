"""What ranks in Triton's interpreter are asked about exchange.py's kernels, over symmetric_jobs' file."""

from pathlib import Path

import torch
import torch.distributed as dist
from symmetric_jobs import _launch_module, workspace

from megatron_ssm_tp.comm.recipes import Bf16
from megatron_ssm_tp.comm.tuning import Launch


def products(directory: Path, shapes: list[tuple[int, int, int]]) -> list[str]:
    """Products summed by one kernel, for weights [R, K] and rows of x, that are not those of two kernels."""
    module, space, wrong = _launch_module(), workspace(directory, 1 << 20), []
    from megatron_ssm_tp.comm.exchange_triton import reduced_product

    generator = torch.Generator().manual_seed(3 + dist.get_rank())
    for rows, columns, requests in shapes:
        # Sums that bfloat16 holds: Triton's interpreter does not round as GPUs do.
        x = torch.randint(-1, 2, (requests, columns + 8), generator=generator).bfloat16()[:, 8:]
        weight = torch.randint(-1, 2, (rows, columns), generator=generator).bfloat16()
        expected = module.reduce(space, x @ weight.T, Bf16(32), 0, Launch("words", tile=32))
        if not torch.equal(reduced_product(space, x, weight), expected):
            wrong.append(f"{rows} x {columns}, {requests}")
    return wrong


def largest(directory: Path, vocabulary: int, seed: int) -> list[str]:
    """Places of largest values, of rows over all ranks and padding, that are not torch's. Many values are tied."""
    _launch_module()
    from megatron_ssm_tp.comm.exchange_triton import largest_over_ranks

    rank, ranks, generator, wrong = dist.get_rank(), dist.get_world_size(), torch.Generator().manual_seed(seed), []
    part = -(-vocabulary // ranks) + 1
    for rows, most in ((1, 3), (5, 1000), (2, 1)):
        whole = torch.randint(-most, most, (rows, ranks * part), generator=generator).float()
        whole[:, vocabulary:] = 9999.0  # padding
        first = rank * part
        columns = min(part, max(0, vocabulary - first))
        mine = whole[:, first : first + part].bfloat16()
        found = largest_over_ranks(workspace(directory, 1 << 20), mine, first, columns)
        expected = whole[:, :vocabulary].bfloat16().argmax(-1)
        if not torch.equal(found, expected):
            wrong.append(f"{rows} rows: {found} for {expected}")
    return wrong
