"""dt, B and C taken out of x_proj's product, and normalized where a model does that: on GPUs by one kernel."""

import torch

from .choose import kernels_can_take
from .few_rows import joined
from .norm import rms_normalize


def split_bcdt(
    parts: torch.Tensor, dt_rank: int, d_state: int, eps: float | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """dt [.., R], and B beside C [.., 2N], of bcdt [.., R + 2N].

    Args:
        parts: [P, .., R + 2N], what bcdt is the sum of (few_rows.few_rows_parts); rows of any stride.
        dtype: of bcdt.
        eps: each of the three is divided by its root mean square (HF FalconMambaMixer's rms_forward), rounded to
            bcdt's dtype; None: they are left as they are.

    Returns:
        dt in bcdt's dtype, its rows without gaps: torch multiplies [T, 1, R] with gaps between rows as T products of
        one row. B and C in float32, as the scan's kernels read them, where neither the CPU nor autograd is concerned;
        else in bcdt's dtype.
    """
    if kernels_can_take(parts):
        from .bcdt_triton import split_bcdt as kernel

        return kernel(parts, dt_rank, d_state, eps, dtype)
    bcdt = joined(parts, dtype)
    if eps is None:
        return bcdt[..., :dt_rank].contiguous(), bcdt[..., dt_rank:]
    dt, B, C = (rms_normalize(part, eps) for part in bcdt.split([dt_rank, d_state, d_state], dim=-1))
    return dt.contiguous(), torch.cat([B, C], dim=-1)
