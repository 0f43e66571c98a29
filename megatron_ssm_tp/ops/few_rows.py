"""Products of few rows, as decoding makes them, at the speed at which the weights can be read.

A weight of bfloat16 [R, K] is 2 R K bytes, read once whatever the number s of rows of x: [16384, 4096] takes 45 us at
3.0 TB/s.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .choose import kernels_can_take

MOST_REQUESTS = 2  # rows of x; of four a step of Falcon-Mamba-7B is no faster than with torch's products


@dataclass(frozen=True)
class FewRowsLaunch:
    """How a product is launched.

    Args:
        rows: of the weight, of a program.
        block_k: columns of a tile; 256 for each warp are loaded 16 bytes a thread and never exchanged.
        warps: of a program.
        stages: tiles in flight, in registers.
    """

    rows: int
    block_k: int
    warps: int
    stages: int = 2


def pick_launch(rows: int, columns: int, requests: int) -> FewRowsLaunch:
    """For a weight [rows, columns] and so many rows of x; measured on an H100 with the sizes of Falcon-Mamba-7B."""
    if columns < 1024:
        return FewRowsLaunch(8, max(16, min(256, 1 << (columns - 1).bit_length())), 1)
    share = 1 if requests == 1 or rows < 1024 else 2  # of x, by the rows of a program
    return FewRowsLaunch(share, 2048 if columns >= 2048 else 1024, 8 if columns >= 2048 else 4)


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, how: FewRowsLaunch | None = None) -> torch.Tensor:
    """x weight^T, summed in float32; the same bits at every call.

    Args:
        x: [.., K], s rows of any stride.
        weight: [R, K], of x's dtype.
        how: None: by the shapes. Torch multiplies instead on the CPU, under autograd, and for s above MOST_REQUESTS.

    Returns:
        [.., R] in x's dtype.
    """
    columns = x.shape[-1]
    if 0 < x.numel() <= MOST_REQUESTS * columns and kernels_can_take(x, weight) and x.dtype == weight.dtype:
        from .few_rows_triton import few_rows_linear as kernel

        return kernel(x.reshape(-1, columns), weight, how).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight)
