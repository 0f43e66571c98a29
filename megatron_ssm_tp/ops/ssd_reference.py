"""State-space duality (Mamba-2) in plain torch: computed in float32, differentiable, the truth for kernels.

The scan of `reference` with one decay a head, so that products over chunks of time take the place of steps. Shapes,
with H heads of P channels and G groups on this rank, N = d_state, each group serving H / G neighbouring heads:

    dense    x [b, l, H, P]   dt [b, l, H]   B, C [b, l, G, N]   state [b, H, P, N]
    packed   x [T, H, P]      dt [T, H]      B, C [T, G, N]      sequences end to end, bounded by cu_seqlens int [s + 1]
    cached   states [slots, H, P, N] read and written in place at `slots` int [s]

`A` is negative, one a head: A = -exp(A_log), float32 [H]. dt = clamp(softplus(dt + dt_bias), dt_limit). Source: Dao and
Gu 2024, listing 1; HF Mamba2Mixer.
"""

import torch
import torch.nn.functional as F

from .reference import dense_index, unpack

CHUNK = 64  # time steps joined in one product: bounds memory, changes no result but by rounding
NO_LIMIT = (0.0, float("inf"))


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = C_t h_t + D x_t.

    Args:
        x: [b, l, H, P]. dt: [b, l, H]. A, D, dt_bias: [H]. B, C: [b, l, G, N]. initial_state: [b, H, P, N] or zeros.
        lengths: int [b], how much of each row counts; the state is taken there. None is all of it.

    Returns:
        y [b, l, H, P] in x's dtype, and the state after each row's last counted step, float32 [b, H, P, N].
    """
    batch, length, heads, channels = x.shape
    groups, states = B.shape[2:]
    dt = F.softplus(dt.float() if dt_bias is None else dt.float() + dt_bias.float()).clamp(*dt_limit)
    if lengths is not None:
        # A step of zero leaves the state as it was: exp(0 A) = 1 and 0 B x = 0.
        counted = torch.arange(length, device=x.device) < lengths.to(x.device)[:, None]
        dt = dt * counted[..., None]
    per_group = heads // groups
    by_group = (batch, length, groups, per_group)
    u = (x.float() * dt[..., None]).reshape(*by_group, channels)
    decay = (dt * A.float()).reshape(by_group)
    state = x.new_zeros(batch, heads, channels, states, dtype=torch.float32) if initial_state is None else initial_state
    state = state.float().reshape(batch, groups, per_group, channels, states)
    outputs = []
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        y, state = _chunk(u[:, part], decay[:, part], B[:, part].float(), C[:, part].float(), state)
        outputs.append(y)
    y = torch.cat(outputs, dim=1).reshape(x.shape)
    if D is not None:
        y = y + x.float() * D.float()[:, None]
    return y.to(x.dtype), state.reshape(batch, heads, channels, states)


def _chunk(
    u: torch.Tensor, decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk of q steps: u [b, q, G, r, P], decay [b, q, G, r] (logarithms), B, C [b, q, G, N], state before it.

    Each step's output is what the state before the chunk still gives, and what the chunk's earlier steps give.
    """
    # Sums of many steps, whose differences between near steps are small: float64, or the differences lose their digits.
    total = decay.double().cumsum(1)  # log of the decay from before the chunk to each step
    between = (total[:, :, None] - total[:, None]).float()  # [b, q, q, G, r]: from step s to step t
    q = torch.arange(u.shape[1], device=u.device)
    later = (q[:, None] >= q)[None, :, :, None, None]
    weights = torch.where(later, between, -torch.inf).exp()
    scores = torch.einsum("btgn,bsgn->btsg", C, B)
    y = torch.einsum("btsg,btsgr,bsgrp->btgrp", scores, weights, u)
    y = y + torch.einsum("btgn,bgrpn,btgr->btgrp", C, state, total.exp().float())
    to_end = (total[:, -1:] - total).exp().float()
    state = state * total[:, -1].exp().float()[..., None, None] + torch.einsum("bsgn,bsgr,bsgrp->bgrpn", B, to_end, u)
    return y, state


def ssd_varlen(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    states: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int | None = None,
) -> torch.Tensor:
    """`ssd` over packed sequences [T, ...], from and into states [slots, H, P, N]; returns y [T, H, P].

    `longest` is of use to kernels alone.
    """
    index, own, lengths = dense_index(cu_seqlens)
    x, dt, B, C = (unpack(tokens, index) for tokens in (x, dt, B, C))
    y, final = ssd(x, dt, A, B, C, D, dt_bias, dt_limit, states[slots], lengths)
    states[slots] = final.to(states.dtype)
    return y[own]


def ssd_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    states: torch.Tensor,
    slots: torch.Tensor,
    at_rest: bool = False,
) -> torch.Tensor:
    """One token for each of s requests: x [s, H, P], dt [s, H], B, C [s, G, N], states in place; y [s, H, P].

    `at_rest` is of use to kernels alone.
    """
    x, dt, B, C = (tokens[:, None] for tokens in (x, dt, B, C))
    y, final = ssd(x, dt, A, B, C, D, dt_bias, dt_limit, states[slots])
    states[slots] = final.to(states.dtype)
    return y[:, 0]
