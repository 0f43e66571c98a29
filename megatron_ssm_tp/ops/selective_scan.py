"""Mamba-1's selective scan on GPUs: reference.selective_scan_varlen and selective_state_step as Triton kernels.

Counted a token and channel at N = 16, for bfloat16 (x, dt, z in, y out), of what sm_90 is given:

    bytes          8: 0.18 ms for 8192 tokens x 8192 channels at 3 TB/s
    exponentials   16, and 3 of their like for softplus and gate: of special-function units, which take a warp's in 8
                   cycles, that is 152 cycles of a quarter SM, 0.34 ms for all of an H100 at 1.755 GHz
    instructions   118, of which 64 are the recurrence's multiplications and additions and 8 loads of B and C: 118
                   cycles of the same

So some of the 16 go to the multiply-add units as polynomials, 8 instructions more each: with 2 of them 17 are left, 136
cycles, beside 134 instructions, about 0.3 ms. There is no shuffle and no shared memory among these, for a thread holds
two channels with all their states; but then 8192 channels are only 128 warps, a quarter of what keeps the units busy,
and prompts have to be cut in time too:

1. `chunk_states`: what each chunk leaves of its own tokens (4 bytes, 17 exponentials, 92 to 98 instructions). It walks
   from the chunk's end, where a token's weight is exp(A * dt after it): no exponential waits for another, and once they
   vanish for all channels of a program the rest of the chunk is not even read. At A = -1 .. -16 and dt near 0.05 that
   leaves a third of a chunk of 1024 tokens. Weights below 2^-32 are what is dropped, whatever dt and A are.
2. `scan_chunks`: each chunk's outputs, from the state that the ones before it leave: an exponential and a multiply-add
   a state for each of them.

A single pass with look-back would pay exponentials twice as well, since the state at a chunk's start reaches every
output through them, and would have programs wait for each other. An associative scan with time across lanes pays them
once, but another multiplication and addition a state, ten shuffles every few tokens, and a transposition of x, dt, z
and y.

Only as many chunks are cut as fill the GPU: prompts of a batch that fills it are scanned whole.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton

from .chunk_states_triton import chunk_states
from .selective_scan_triton import scan_chunks
from .state_step_triton import state_step

SHORTEST_CHUNK = 64


@dataclass(frozen=True)
class ScanLaunch:
    """How the kernels of a prefill are launched.

    Args:
        chunk: tokens in a chunk, about; None is what fills the GPU.
        warps: of a program; it has 64 channels a warp.
        unroll: tokens whose loads are in flight together; chunks are multiples.
        polynomial: how many of 16 exponentials `scan_chunks` gives to the multiply-add units.
        back_polynomial: the same of `chunk_states`.
        groups: parts of the states that `chunk_states` follows for as long as each matters: 1, 2 or 4.
        ahead: load x, dt and z of the next tokens before these are computed, instead of leaving it to other warps.
        widen: copy B and C to float32 first, instead of in every program.
        warps_per_sm: how many warps fill an SM.
        max_registers: a thread's, in `scan_chunks` and `chunk_states`; None is what the compiler takes.
    """

    chunk: int | None = None
    warps: int = 1
    unroll: int = 8
    polynomial: int = 5
    back_polynomial: int = 0
    groups: int = 2
    ahead: bool = False
    widen: bool = False
    warps_per_sm: int = 32
    max_registers: tuple[int | None, int | None] = (None, None)


DEFAULT = ScanLaunch()


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
    how: ScanLaunch = DEFAULT,
) -> torch.Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = (C_t h_t + D x_t) silu(z_t), with dt = softplus(dt + dt_bias).

    Args:
        x, dt, z: [T, D], bfloat16, float16 or float32; rows of any stride.
        A: [D, N]. B, C: [T, N], or [T, H, N] for H equal runs of channels; rows of any stride. D, dt_bias: [D].
        states: [slots, D, N], float32 or narrower, read at each sequence's start and written in place at its end.
        slots: int [s], each sequence's own.
        cu_seqlens: int [s + 1], where sequences begin and end in T. Not read by the host.

    Returns:
        y [T, D] in x's dtype. Nothing here is differentiable.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel() or cu_seqlens.numel() < 2:
        return out
    x, dt, z = (last_axis_dense(t) for t in (x, dt, z))
    B, C = (_by_head(t.float() if how.widen else t) for t in (B, C))
    A, D, dt_bias, cached = A.float().contiguous(), D.contiguous(), dt_bias.contiguous(), dense_states(states)
    shape = _Shape(len(x), cu_seqlens.numel() - 1, x.shape[1], B.shape[1], A.shape[1])
    lanes, chunk = shape.lanes(how.warps), how.chunk or shape.chunk(how, x.device)
    cut = 2 * shape.tokens >= 3 * chunk  # the shortest that chunk_of cuts is 1.5 chunks
    grid = shape.grid(lanes, shape.tokens // chunk + shape.sequences)
    starts = A.new_empty(grid[1] if cut else 0, shape.d_state, shape.channels)
    steps = A.new_empty(grid[1] if cut else 0, shape.channels)
    where = (cached, slots, cu_seqlens, starts, steps, shape.sequences, *shape.geometry(lanes), chunk)
    options = {"N": shape.padded, "LANES": lanes, "UNROLL": how.unroll, "MASKED": shape.masked(lanes)}
    options["num_warps"] = how.warps
    if cut:
        strides = (x.stride(0), dt.stride(0), *B.stride()[:2], cached.stride(0))
        own = {"GROUPS": min(how.groups, shape.padded), "POLYNOMIAL": how.back_polynomial}
        chunk_states[grid](x, dt, A, B, dt_bias, *where, *strides, **options, **own, maxnreg=how.max_registers[1])
    strides = (x.stride(0), dt.stride(0), z.stride(0), *B.stride()[:2], *C.stride()[:2], cached.stride(0))
    own = {"AHEAD": how.ahead, "POLYNOMIAL": how.polynomial}
    given = (x, dt, z, out, A, B, C, D, dt_bias)
    scan_chunks[grid](*given, *where, *strides, **options, **own, maxnreg=how.max_registers[0])
    if cached is not states:
        states.copy_(cached)
    return out


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
) -> torch.Tensor:
    """One token for each of s requests: x, dt, z [s, D], B, C [s, N] or [s, H, N], as in `selective_scan_varlen`.

    Returns:
        y [s, D] in x's dtype; states [slots, D, N] are updated in place.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, dt, z = (last_axis_dense(t) for t in (x, dt, z))
    B, C = _by_head(B), _by_head(C)
    A, D, dt_bias, cached = A.float().contiguous(), D.contiguous(), dt_bias.contiguous(), dense_states(states)
    shape = _Shape(len(x), len(x), x.shape[1], B.shape[1], A.shape[1])
    lanes = max(1, 1024 // shape.padded)  # of two channels; 16 states a thread
    strides = (x.stride(0), dt.stride(0), z.stride(0), *B.stride()[:2], *C.stride()[:2], cached.stride(0))
    given = (x, dt, z, out, A, B, C, D, dt_bias, cached, slots)
    state_step[shape.grid(lanes, len(x))](
        *given, *shape.geometry(lanes), *strides, N=shape.padded, CHANNELS=2 * lanes, num_warps=4
    )
    if cached is not states:
        states.copy_(cached)
    return out


@dataclass(frozen=True)
class _Shape:
    tokens: int
    sequences: int
    channels: int
    heads: int
    d_state: int

    @property
    def padded(self) -> int:
        """The power of two that holds a state."""
        return triton.next_power_of_2(self.d_state)

    @property
    def head_channels(self) -> int:
        return self.channels // self.heads

    def lanes(self, warps: int) -> int:
        """Lanes of a program: all threads, as long as a thread can hold two whole states."""
        return max(1, 32 * warps * 16 // max(16, self.padded))

    def masked(self, lanes: int) -> bool:
        """Whether some lanes or rows of a tile are of no channel or state."""
        return self.head_channels % (2 * lanes) != 0 or self.d_state != self.padded

    def geometry(self, lanes: int) -> tuple[int, int, int, int]:
        """What kernels are told: channels, channels of a head, programs for these, d_state."""
        return self.channels, self.head_channels, -(-self.head_channels // (2 * lanes)), self.d_state

    def grid(self, lanes: int, slots: int) -> tuple[int, int]:
        """Programs for a chunk, or for a request, and how many there may be of these."""
        return self.heads * -(-self.head_channels // (2 * lanes)), slots

    def chunk(self, how: ScanLaunch, device: torch.device) -> int:
        """Tokens in a chunk, about, so that the GPU is full; each of equal sequences is cut into equal chunks."""
        warps = self.grid(self.lanes(how.warps), 1)[0] * how.warps
        wanted = max(1, how.warps_per_sm * multiprocessors(device) // warps)
        return even_chunk(self.tokens, self.sequences, max(SHORTEST_CHUNK, self.tokens // wanted))


def even_chunk(tokens: int, sequences: int, size: int) -> int:
    """About `size`, and such that each of equal sequences is cut into equal chunks; it is whole below 1.5 of these."""
    mean = -(-tokens // sequences)
    if 2 * mean < 3 * size:
        return max(size, mean)
    return -(-mean // round(mean / size))


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def last_axis_dense(x: torch.Tensor) -> torch.Tensor:
    """x, copied if its last axis has gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_states(states: torch.Tensor) -> torch.Tensor:
    """states [slots, D, ..], copied if a slot has gaps; slots may be any number of values apart."""
    return states if states[0].is_contiguous() else states.contiguous()


def _by_head(shared: torch.Tensor) -> torch.Tensor:
    """B or C as [T, H, N]."""
    return last_axis_dense(shared if shared.dim() == 3 else shared.unsqueeze(1))
