"""Mamba-1's selective scan on GPUs: reference.selective_scan_varlen and selective_state_step as Triton kernels.

Counted a token and channel at N = 16, for bfloat16 (x, dt, z in, y out), of what sm_90 is given:

    bytes          8: 0.18 ms for 8192 tokens x 8192 channels at 3 TB/s
    exponentials   16, and 3 of their like for softplus and gate: of special-function units, which take a warp's in 8
                   cycles, that is 152 cycles of a quarter SM, 0.34 ms for all of an H100 at 1.755 GHz
    instructions   130, of which 80 are the recurrence's: 130 cycles of the same

So some of the 16 go to the multiply-add units as polynomials, 8 instructions more each: with 2 of them 17 are left, 136
cycles, beside 147 instructions, 0.33 ms. There is no shuffle among these, for a thread holds two channels with all
their states; but then 8192 channels are only 128 warps, a quarter of what hides latencies, and few prompts have to be
cut in time too: the kernel first computes what each chunk leaves of its own tokens (14 exponentials and 123
instructions, 3 of the 16 being polynomials; but for a sequence's last chunk), then each chunk's outputs from the state
that the ones before it leave.

A single pass with look-back would pay exponentials twice as well, since the state at a chunk's start reaches every
output through them, and would have programs wait for each other. An associative scan with time across lanes pays them
once, but another multiplication and addition a state, ten shuffles every few tokens, and a transposition of x, dt, z
and y.
"""

from dataclasses import dataclass

import torch

from ..errors import UserError
from .kernel_calls import launch
from .launching import Chunks, alike, dense_states, even_chunk, last_axis_dense, multiprocessors, power_of_two
from .selective_scan_triton import scan_chunks
from .state_step_triton import state_step

SHORTEST_CHUNK, SHORT_CHUNK = 64, 256
ENOUGH_WARPS, FULL_OF_WARPS = 3, 16  # of a multiprocessor


@dataclass(frozen=True)
class ScanLaunch:
    """How the kernel of a prefill is launched.

    Args:
        chunk: tokens in a chunk, about.
        warps: of a program; it has 64 channels a warp.
        stages: groups of four tokens that are loaded ahead, and one.
        polynomial: how many of 16 exponentials are given to the multiply-add units where y is computed.
        states_polynomial: the same where only states are.
        max_registers: a thread's; None is what the compiler takes.
    """

    chunk: int
    warps: int = 1
    stages: int = 3
    polynomial: int = 2
    states_polynomial: int = 3
    max_registers: int | None = None


def launch_for(tokens: int, sequences: int, warps: int, processors: int, longest: int | None = None) -> ScanLaunch:
    """Prompts that fill the GPU are not cut, others into as many chunks as fill it; equal prompts into equal chunks.

    Cut ones pay both passes, so that a warp alone on a quarter of a multiprocessor, slow as it is, already beats them.
    Chunks of less than SHORT_CHUNK tokens cost more than warps that are missing, but where there are few tokens.

    Args:
        warps: that have all channels between them.
        longest: tokens of the longest prompt, see alike().
    """
    sequences = alike(tokens, sequences, longest)
    if sequences * warps >= ENOUGH_WARPS * processors:
        return ScanLaunch(chunk=tokens, max_registers=168)
    shortest = max(SHORTEST_CHUNK, min(SHORT_CHUNK, tokens // 32))
    size = max(shortest, tokens // max(1, FULL_OF_WARPS * processors // warps))
    return ScanLaunch(even_chunk(tokens, sequences, size), max_registers=128)


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
    how: ScanLaunch | None = None,
    longest: int | None = None,
) -> torch.Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = (C_t h_t + D x_t) silu(z_t), with dt = softplus(dt + dt_bias).

    Args:
        x, dt, z: [T, D], bfloat16, float16 or float32; rows of any stride.
        A: [D, N]. B, C: [T, N], or [T, H, N] for H equal runs of channels; rows of any stride. D, dt_bias: [D].
        states: [slots, D, N], float32 or narrower, read at each sequence's start and written in place at its end.
        slots: int [s], each sequence's own.
        cu_seqlens: int [s + 1], where sequences begin and end in T. Not read by the host.
        longest: tokens of the longest of them, where the host knows: a long one among short ones is cut then.

    Returns:
        y [T, D] in x's dtype. Nothing here is differentiable.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel() or cu_seqlens.numel() < 2:
        return out
    x, dt, z = (last_axis_dense(t) for t in (x, dt, z))
    A, D, dt_bias, cached = A.float().contiguous(), D.contiguous(), dt_bias.contiguous(), dense_states(states)
    shape = ScanShape(x.shape[0], cu_seqlens.numel() - 1, x.shape[1], 1 if B.dim() == 2 else B.shape[1], A.shape[1])
    how = how or launch_for(shape.tokens, shape.sequences, shape.warps, multiprocessors(x.device), longest)
    lanes, chunks = shape.lanes(how.warps), Chunks(shape.tokens, shape.sequences, how.chunk)
    grid = shape.grid(lanes, chunks.programs)
    starts = A.new_empty(chunks.slots, shape.d_state, shape.channels)
    steps = A.new_empty(chunks.slots, shape.channels)
    given = (x, dt, z, out, A, packed_bc(B, C, shape), D, dt_bias, cached, slots.contiguous())
    given += (cu_seqlens.contiguous(), starts, steps)
    numbers = (shape.sequences, *shape.geometry(lanes), how.chunk)
    numbers += (x.stride(0), dt.stride(0), z.stride(0), cached.stride(0))
    options = {"N": shape.padded, "LANES": lanes, "STAGES": how.stages, "MASKED": shape.masked(lanes)}
    options |= {"num_warps": how.warps, "maxnreg": how.max_registers}
    options["ONE_EACH"] = chunks.one_each
    if chunks.cut:
        launch(scan_chunks, grid, given, numbers, POLYNOMIAL=how.states_polynomial, STATES_ONLY=True, **options)
    launch(scan_chunks, grid, given, numbers, POLYNOMIAL=how.polynomial, STATES_ONLY=False, **options)
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
    at_rest: bool = False,
) -> torch.Tensor:
    """One token for each of s requests: x, dt, z [s, D], B, C [s, N] or [s, H, N], as in `selective_scan_varlen`.

    Args:
        at_rest: the kernel launched before this does not write states or slots: their reading need not wait for it.

    Returns:
        y [s, D] in x's dtype; states [slots, D, N] are updated in place.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, dt, z = (last_axis_dense(t) for t in (x, dt, z))
    B, C = _by_head(B), _by_head(C)
    A, D, dt_bias, cached = A.float().contiguous(), D.contiguous(), dt_bias.contiguous(), dense_states(states)
    dense_slots = slots.contiguous()
    shape = ScanShape(x.shape[0], x.shape[0], x.shape[1], B.shape[1], A.shape[1])
    lanes = max(1, 1024 // shape.padded)  # of two channels; 16 states a thread
    numbers = shape.geometry(lanes)
    numbers += (x.stride(0), dt.stride(0), z.stride(0), *B.stride()[:2], *C.stride()[:2], cached.stride(0))
    given, grid = (x, dt, z, out, A, B, C, D, dt_bias, cached, dense_slots), shape.grid(lanes, x.shape[0])
    launch(
        state_step,
        grid,
        given,
        numbers,
        N=shape.padded,
        CHANNELS=2 * lanes,
        AT_REST=at_rest and cached is states and dense_slots is slots,
        num_warps=4,
    )
    if cached is not states:
        states.copy_(cached)
    return out


@dataclass(frozen=True)
class ScanShape:
    tokens: int
    sequences: int
    channels: int
    heads: int
    d_state: int

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            problem = f"do not divide {self.channels} channels"
            raise UserError("B", f"{self.heads} heads", problem, "a divisor of the channels")

    @property
    def padded(self) -> int:
        """The power of two that holds a state."""
        return power_of_two(self.d_state)

    @property
    def head_channels(self) -> int:
        return self.channels // self.heads

    def lanes(self, warps: int) -> int:
        """Lanes of a program: all threads, as long as a thread can hold two whole states."""
        return max(1, 32 * warps * 16 // max(16, self.padded))

    @property
    def warps(self) -> int:
        """Programs of one warp that have all channels between them."""
        return self.grid(self.lanes(1), 1)[0]

    def masked(self, lanes: int) -> bool:
        """Whether some lanes of a tile are of no channel."""
        return self.head_channels % (2 * lanes) != 0

    def geometry(self, lanes: int) -> tuple[int, int, int, int, int]:
        """What kernels are told: channels, heads, channels of a head, programs for these, d_state."""
        return self.channels, self.heads, self.head_channels, -(-self.head_channels // (2 * lanes)), self.d_state

    def grid(self, lanes: int, slots: int) -> tuple[int, int]:
        """Programs for a chunk, or for a request, and how many there may be of these."""
        return self.heads * -(-self.head_channels // (2 * lanes)), slots


def packed_bc(B: torch.Tensor, C: torch.Tensor, shape: ScanShape) -> torch.Tensor:
    """B and C side by side, as every program of the scan reads them: float32 [T, H, 2, padded N]. Not copied where
    they are that already (bcdt.py)."""
    row = (shape.heads * 2 * shape.padded, 2 * shape.padded)
    beside = C.data_ptr() == B.data_ptr() + 4 * shape.d_state and shape.padded == shape.d_state
    dense = B.stride() == C.stride() == ((row[0], 1) if B.dim() == 2 else (*row, 1))
    if beside and dense and B.dtype == C.dtype == torch.float32 and B.data_ptr() % 16 == 0:
        return B.as_strided((shape.tokens, shape.heads, 2, shape.padded), (*row, shape.padded, 1))
    packed = B.new_zeros if shape.padded != shape.d_state else B.new_empty
    packed = packed((shape.tokens, shape.heads, 2, shape.padded), dtype=torch.float32)
    for i, shared in enumerate((B, C)):
        packed[:, :, i, : shape.d_state] = _by_head(shared)
    return packed


def _by_head(shared: torch.Tensor) -> torch.Tensor:
    """B or C as [T, H, N]."""
    return last_axis_dense(shared if shared.dim() == 3 else shared.unsqueeze(1))
