"""A step of Mamba-1's decoding from x_proj's product on, for few requests: norms, dt_proj, state and gate at once.

What is apart elsewhere (split_bcdt, dt_proj's linear, selective_state_step) takes three launches, of which each costs
more than its work where there are few requests. A program has some channels: it makes dt, B and C of its request anew,
of some hundred values, and reads its rows of dt_proj's weight, [D, R] in all: for every request, so these must be few.
"""

import torch
import torch.nn.functional as F

from .bcdt import split_bcdt
from .choose import kernels_can_take
from .kernel_calls import launch
from .launching import dense_states, last_axis_dense, power_of_two
from .reference import selective_state_step

MOST_REQUESTS = 2  # with three to eight, x_proj in parts and three launches take 5 us less on an H100
WIDEST = 1024  # dt_rank that a program holds
_CHANNELS, _WARPS = 32, 4


def fits(requests: int, dt_rank: int) -> bool:
    """Whether the kernel is for so many requests, and such a dt_proj."""
    return 0 < requests <= MOST_REQUESTS and dt_rank <= WIDEST


def dt_and_step(
    bcdt: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    dt_weight: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    eps: float | None,
    at_rest: bool = False,
) -> torch.Tensor:
    """selective_state_step of dt = split_bcdt(bcdt) dt_weight^T, rounded to x's dtype before dt_bias is added.

    Args:
        bcdt: [s, R + 2N], x_proj's product, summed over the ranks; rows of any stride.
        x, z: [s, D]; rows of any stride.
        dt_weight: [D, R]. A: [D, N], float32. D, dt_bias: [D].
        states: [slots, D, N], updated in place at slots int [s]; for a slot of -1 nothing is read or written.
        eps: of the norms of dt, B and C; None: there are none.
        at_rest: as selective_state_step's.

    Returns:
        y [s, D] in x's dtype.
    """
    if not kernels_can_take(x, bcdt, dt_weight):
        return _reference(bcdt, x, z, dt_weight, A, D, dt_bias, states, slots, eps)
    from .dt_step_triton import dt_step

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, z, bcdt, cached = last_axis_dense(x), last_axis_dense(z), last_axis_dense(bcdt), dense_states(states)
    (requests, channels), (rank, d_state) = x.shape, (dt_weight.shape[1], A.shape[1])
    weights, dense_slots = [t.contiguous() for t in (dt_weight, A.float(), D, dt_bias)], slots.contiguous()
    launch(
        dt_step,
        (-(-channels // _CHANNELS), requests),
        (bcdt, x, z, out, *weights, cached, dense_slots),
        (channels, x.stride(0), z.stride(0), bcdt.stride(0), cached.stride(0), eps or 0.0),
        RANK=rank,
        D_STATE=d_state,
        R=power_of_two(rank),
        N=power_of_two(d_state),
        CHANNELS=_CHANNELS,
        NORMED=eps is not None,
        AT_REST=at_rest and cached is states and dense_slots is slots,
        num_warps=_WARPS,
    )
    if cached is not states:
        states.copy_(cached)
    return out


def _reference(
    bcdt: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    dt_weight: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    eps: float | None,
) -> torch.Tensor:
    dt, bc = split_bcdt(bcdt[None], dt_weight.shape[1], A.shape[1], eps, x.dtype)
    return selective_state_step(x, F.linear(dt, dt_weight), A, *bc.chunk(2, dim=-1), D, z, dt_bias, states, slots)
