"""Products of few rows, as decoding makes them, at the speed at which the weights can be read.

A weight of bfloat16 [R, K] is 2 R K bytes, read once whatever the number s of rows of x: [16384, 4096] takes 45 us at
3.0 TB/s. One or two rows are multiplied in lanes (few_rows_triton.py), more by tensor cores (tiles_triton.py), where a
weight of few rows is shared out by its columns too: what is left are sums over parts of them, which the next kernel
reads and adds.
"""

from functools import cache

import torch
import torch.nn.functional as F

from .choose import kernels_can_take
from .few_rows_launch import IN_LANES, IN_TILES, MOST_PARTS, pick_launch, pick_tiles


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T, summed in float32; the same bits at every call.

    Args:
        x: [.., K], s rows of any stride.
        weight: [R, K], of x's dtype.

    Returns:
        [.., R] in x's dtype. Torch multiplies on the CPU, under autograd, for many rows of x, and for more than two
        where the weight's rows are too few for tiles of them to keep the memory busy.
    """
    parts = _parts(x, weight, most=1)
    return F.linear(x, weight) if parts is None else parts[0]


def few_rows_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """few_rows_linear's product as a sum: float32 [P, .., R], or [1, .., R] in x's dtype; see `joined`."""
    parts = _parts(x, weight, most=MOST_PARTS)
    return F.linear(x, weight)[None] if parts is None else parts


def joined(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the readers of parts [P, ..] do: their sum, rounded to dtype; one part is taken as it is."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(dtype)


def _parts(x: torch.Tensor, weight: torch.Tensor, most: int) -> torch.Tensor | None:
    """[P, .., R] by a kernel that leaves no more parts than `most`, or None."""
    (rows, columns), requests = weight.shape, x.shape[:-1].numel()
    if not 0 < requests <= IN_TILES or not kernels_can_take(x, weight) or x.dtype != weight.dtype:
        return None
    shape = (*x.shape[:-1], rows)
    if requests <= IN_LANES:
        from .few_rows_triton import few_rows_product

        return few_rows_product(x.reshape(-1, columns), weight, pick_launch(rows, columns, requests)).view(1, *shape)
    how = pick_tiles(rows, columns, requests)
    if how is None or how.parts > most or not _tiles_pay(x.device, x.dtype):
        return None
    from .tiles_triton import tiles_product

    return tiles_product(x.reshape(-1, columns), weight, how).view(-1, *shape)


@cache
def _tiles_pay(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tiles have been found faster than torch's products, of 16-bit values, on Hopper; data center Blackwell's
    has the same shared memory, others do not."""
    return dtype.itemsize == 2 and torch.cuda.get_device_capability(device)[0] in (9, 10)
