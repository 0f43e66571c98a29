"""Selective scan and causal convolution in plain torch: computed in float32, differentiable, the truth for kernels.

Everything is vectorized except time. Shapes, with D channels on this rank, N = d_state, K = d_conv:

    dense    x, z, dt [b, l, D]   B, C [b, l, N]   ssm state [b, D, N]   conv state [b, D, K]: the last K inputs
    packed   x, z, dt [T, D]      B, C [T, N]      sequences end to end, bounded by cu_seqlens int [s + 1]
    cached   states [slots, D, ...] read and written in place at `slots` int [s]

`A` is negative: A = -exp(A_log), float32 [D, N]. `dt_bias` [D] is added to dt before the softplus. Outputs have x's
dtype; states have their buffer's. Source: Gu & Dao 2023, algorithm 2; HF MambaMixer.
"""

import torch
import torch.nn.functional as F

# Time steps whose [b, D, N] terms are held at once: bounds memory at long prompts, changes no result.
TIME_BLOCK = 64


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution, then SiLU.

    Args:
        x: [b, l, D]. weight: [D, K]. bias: [D].
        initial_state: [b, D, K], the inputs before x; None is zeros.
        lengths: int [b], how much of each row counts; None is all of it. What lies beyond does not enter the state.

    Returns:
        y [b, l, D], and the state after each row's last counted input, float32 [b, D, K].
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    history = x.new_zeros(batch, width, channels) if initial_state is None else initial_state.transpose(1, 2)
    inputs = torch.cat([history.float(), x.float()], dim=1)  # input t of x stands at width + t
    taps = weight.float()
    y = sum(inputs[:, k + 1 : k + 1 + length] * taps[:, k] for k in range(width))
    if bias is not None:
        y = y + bias.float()
    if lengths is None:
        final = inputs[:, length:]
    else:
        last = lengths.to(x.device)[:, None] + torch.arange(width, device=x.device)
        final = inputs.gather(1, last[..., None].expand(-1, -1, channels))
    return F.silu(y).to(x.dtype), final.transpose(1, 2)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = (C_t h_t + D x_t) silu(z_t), with dt = softplus(dt + dt_bias).

    Args:
        x, dt, z: [b, l, D]. A: [D, N]. B, C: [b, l, N], or [b, l, H, N] for H equal runs of channels. D, dt_bias: [D].
        initial_state: [b, D, N]; None is zeros.
        lengths: int [b], how much of each row counts; the state is taken there. None is all of it.

    Returns:
        y [b, l, D], and the state after each row's last counted input, float32 [b, D, N].
    """
    batch, length, channels = x.shape
    u, dt = x.float(), dt.float()
    B, C = (t.float() if t.dim() == 4 else t.float().unsqueeze(2) for t in (B, C))
    by_head = (B.shape[2], -1)
    step = F.softplus(dt if dt_bias is None else dt + dt_bias.float())
    if lengths is not None:
        # A step of zero leaves the state as it was: exp(0 A) = 1 and 0 B x = 0.
        counted = torch.arange(length, device=x.device) < lengths.to(x.device)[:, None]
        step = step * counted[..., None]
    state = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state.float()
    outputs = []
    for start in range(0, length, TIME_BLOCK):
        block = slice(start, start + TIME_BLOCK)
        decay = torch.exp(step[:, block, :, None] * A.float())
        weighted = (step[:, block] * u[:, block]).unflatten(-1, by_head)
        drive = (weighted[..., None] * B[:, block, :, None]).flatten(2, 3)
        states = []
        for decay_t, drive_t in zip(decay.unbind(1), drive.unbind(1), strict=True):
            state = torch.addcmul(drive_t, decay_t, state)
            states.append(state)
        seen = torch.stack(states, dim=1).unflatten(2, by_head)
        outputs.append(torch.einsum("blhdn,blhn->blhd", seen, C[:, block]).flatten(2))
    y = torch.cat(outputs, dim=1) if outputs else torch.zeros_like(u)
    if D is not None:
        y = y + u * D.float()
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype), state


def unpack(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Packed [T, ...] -> dense [s, longest, ...]; what lies beyond a sequence's end is some other token."""
    return tokens[index.clamp(max=len(tokens) - 1)]


def dense_index(cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions [s, longest] of each sequence's tokens, which of them are its own (bool), and lengths [s]."""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    steps = torch.arange(int(lengths.max()), device=cu_seqlens.device)
    return starts[:, None] + steps, steps < lengths[:, None], lengths


def causal_conv1d_varlen(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """`causal_conv1d` over packed sequences x [T, D], from and into states [slots, D, K]; returns y [T, D]."""
    index, own, lengths = dense_index(cu_seqlens)
    y, final = causal_conv1d(unpack(x, index), weight, bias, states[slots], lengths)
    states[slots] = final.to(states.dtype)
    return y[own]


def selective_scan_varlen(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int | None = None,
) -> torch.Tensor:
    """`selective_scan` over packed sequences [T, ...], from and into states [slots, D, N]; returns y [T, D].

    `longest` is of use to kernels alone.
    """
    index, own, lengths = dense_index(cu_seqlens)
    x, dt, B, C, z = (unpack(tokens, index) for tokens in (x, dt, B, C, z))
    y, final = selective_scan(x, dt, A, B, C, D, z, dt_bias, states[slots], lengths)
    states[slots] = final.to(states.dtype)
    return y[own]


def causal_conv1d_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    at_rest: bool = False,
) -> torch.Tensor:
    """One token for each of s requests: x [s, D], states [slots, D, K] updated in place; returns y [s, D].

    `at_rest` is of use to kernels alone.
    """
    y, final = causal_conv1d(x[:, None], weight, bias, states[slots])
    states[slots] = final.to(states.dtype)
    return y[:, 0]


def selective_state_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    at_rest: bool = False,
) -> torch.Tensor:
    """One token for each of s requests: x, dt, z [s, D], B, C [s, N], states [slots, D, N] in place; y [s, D].

    `at_rest` is of use to kernels alone.
    """
    x, dt, B, C, z = (tokens[:, None] for tokens in (x, dt, B, C, z))
    y, final = selective_scan(x, dt, A, B, C, D, z, dt_bias, states[slots])
    states[slots] = final.to(states.dtype)
    return y[:, 0]
