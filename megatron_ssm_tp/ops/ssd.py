"""State-space duality (Mamba-2) on GPUs: ssd_reference.ssd_varlen and ssd_step as Triton kernels.

A prompt's prefill is four products a block of Q = 64 tokens, head of P channels and N = d_state:

    C B^T [Q, Q], weighted by decays and dt, times x [Q, P]      what the block's own tokens give
    C [Q, N] times the state [N, P]                              what is left of those before
    x^T [P, Q], weighted by decays and dt, times B [Q, N]        the next state

The state stays in a program's registers from block to block; nothing of it is written but at a chunk's end. That takes
prompts in sequence, so they are cut into chunks until programs fill the GPU, and `chunk_states` first finds what each
chunk leaves: its time is the third product's. A batch that fills the GPU is scanned whole. Decays are made once, by
`block_decays`, for both.

Megatron-Core 0.19's kernels (ssm/ops/ssd_combined.py) and mamba-ssm's write the state of every block of 128 or 256
tokens to memory, read it to pass it on, and read it again: 4 P N bytes a block and head each time. Megatron's also want
chunk bounds made on the host and a gathered copy of the initial states, tune themselves at the first call, and take
log(1 + exp(dt)) as it stands, which loses the digits of a small dt: of 1e-5 up to 0.6 %. Its step keeps the stray store
into x, where no intermediate states are asked for (ssm/ops/mamba_ssm.py).

Precision: bfloat16 tokens are multiplied as bfloat16; what multiplies them (weighted scores, the state, weighted x) is
rounded to bfloat16, once each, and sums are float32. float16 is multiplied as TF32, which holds it and does not
overflow; float32 as three TF32 products. States are float32 in registers, and so are sums of logarithms of decays over
a block: decays are off by 2^-24 of these, to which a step adds 150 at most, however much it forgets.
"""

from dataclasses import dataclass

import torch
import triton.language as tl

from ..errors import UserError
from .kernel_calls import launch
from .launching import Chunks, alike, dense_states, even_chunk, last_axis_dense, multiprocessors, power_of_two
from .ssd_states_triton import block_decays, chunk_states
from .ssd_step_triton import ssd_state_step
from .ssd_triton import scan_chunks

SHORTEST_CHUNK = 256
_HEADS_OF_DECAYS = 16  # heads of a program of block_decays
_STEP_VALUES = 4096  # of the state, of a program of a step
_PRODUCTS = {
    torch.bfloat16: (tl.bfloat16, "tf32"),  # the second is of float32 alone
    torch.float16: (tl.float32, "tf32"),
    torch.float32: (tl.float32, "tf32x3"),
}


@dataclass(frozen=True)
class SSDLaunch:
    """How the kernels of a prefill are launched.

    Args:
        block: tokens joined in a product: 16, 32, 64 or 128.
        channels: of a head, of a program, at most; a power of two from 16.
        chunk: tokens in a chunk, about; None is what fills the GPU.
        warps, stages: of a program of `scan_chunks`; blocks whose loads are in flight, and one.
        states_warps, states_stages: of `chunk_states`.
        programs_per_sm: how many fill an SM.
    """

    block: int = 64
    channels: int = 64
    chunk: int | None = None
    warps: int = 4
    stages: int = 2
    states_warps: int = 4
    states_stages: int = 3
    programs_per_sm: int = 2


def launch_for(dtype: torch.dtype, d_state: int) -> SSDLaunch:
    """What fits into an SM's shared memory and registers: tokens' rows of B and C decide."""
    row = _tile(d_state) * _PRODUCTS[dtype][0].primitive_bitwidth // 8
    if row <= 256:
        return SSDLaunch()
    wide = row > 1024 or (row == 1024 and dtype == torch.float32)  # 64 channels would be 128 KB: an sm_86 has 99
    return SSDLaunch(block=32, channels=32 if wide else 64, stages=1, states_stages=2)


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
    how: SSDLaunch | None = None,
    longest: int | None = None,
) -> torch.Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = C_t h_t + D x_t, with dt = clamp(softplus(dt + dt_bias)).

    Args:
        x: [T, H, P], bfloat16, float16 or float32; rows of any stride. Products are of its dtype.
        dt: [T, H]; rows of any stride. A, D, dt_bias: [H]. B, C: [T, G, N], rows of any stride, G a divisor of H.
        dt_limit: what dt is clamped to.
        states: [slots, H, P, N], float32 or narrower, read at each sequence's start and written in place at its end.
        slots: int [s], each sequence's own.
        cu_seqlens: int [s + 1], where sequences begin and end in T. Not read by the host.
        longest: tokens of the longest of them, where the host knows: a long one among short ones is cut then.
        how: None is launch_for(x.dtype, N).

    Returns:
        y [T, H, P] in x's dtype. Nothing here is differentiable.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel() or cu_seqlens.numel() < 2:
        return out
    x, B, C, dt = _dense_rows(x), _dense_rows(B), _dense_rows(C), last_axis_dense(dt)
    A, D, dt_bias, cached = A.float().contiguous(), D.contiguous(), dt_bias.contiguous(), dense_states(states)
    shape, how = _Shape(*x.shape, *B.shape[1:], cu_seqlens.numel() - 1), how or launch_for(x.dtype, B.shape[2])
    step, total = A.new_empty(2, shape.heads, shape.tokens)
    launch(
        block_decays,
        shape.grid(how.block, -(-shape.heads // _HEADS_OF_DECAYS)),
        (dt, A, dt_bias, step, total, cu_seqlens),
        (shape.sequences, shape.tokens, shape.heads, dt.stride(0), *map(float, dt_limit)),
        BLOCK=how.block,
        HEADS=_HEADS_OF_DECAYS,
    )
    chunk = how.chunk or shape.chunk(how, x.device, longest)
    chunks = Chunks(shape.tokens, shape.sequences, chunk)
    grid = (shape.heads * shape.channel_blocks(how.channels), chunks.programs)
    starts = A.new_empty(chunks.slots, shape.heads, shape.channels, shape.d_state)
    decays = A.new_empty(chunks.slots, shape.heads)
    where = (step, total, cached, slots.contiguous(), cu_seqlens.contiguous(), starts, decays)
    numbers = (shape.sequences, chunk, *shape.geometry(how.channels))
    options = shape.tiles(how.channels) | {"BLOCK": how.block, "MASKED": shape.masked(how.channels)}
    options["PRODUCT"], options["PRECISION"] = _PRODUCTS[x.dtype]
    options["ONE_EACH"] = chunks.one_each
    if chunks.cut:
        strides = (x.stride(0), B.stride(0), cached.stride(0))
        options |= {"num_warps": how.states_warps, "num_stages": how.states_stages}
        launch(chunk_states, grid, (x, B, *where), numbers + strides, **options)
    strides = (x.stride(0), B.stride(0), C.stride(0), cached.stride(0))
    options |= {"num_warps": how.warps, "num_stages": how.stages}
    launch(scan_chunks, grid, (x, B, C, D, out, *where), numbers + strides, **options)
    if cached is not states:
        states.copy_(cached)
    return out


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
    """One token for each of s requests: x [s, H, P], dt [s, H], B, C [s, G, N], as in `ssd_varlen`; all in float32.

    Args:
        at_rest: the kernel launched before this does not write states or slots: their reading need not wait for it.

    Returns:
        y [s, H, P] in x's dtype; states [slots, H, P, N] are updated in place.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, B, C, dt = _dense_rows(x), _dense_rows(B), _dense_rows(C), last_axis_dense(dt)
    A, D, dt_bias, cached = A.float().contiguous(), D.contiguous(), dt_bias.contiguous(), dense_states(states)
    dense_slots = slots.contiguous()
    shape = _Shape(*x.shape, *B.shape[1:], x.shape[0])
    N = power_of_two(shape.d_state)
    P = min(power_of_two(shape.channels), max(1, _STEP_VALUES // N))
    blocks = -(-shape.channels // P)
    numbers = (shape.heads, shape.heads // shape.groups, shape.channels, blocks, shape.d_state)
    numbers += (x.stride(0), dt.stride(0), B.stride(0), C.stride(0), cached.stride(0), *map(float, dt_limit))
    given, grid = (x, dt, out, A, B, C, D, dt_bias, cached, dense_slots), (shape.heads * blocks, x.shape[0])
    launch(
        ssd_state_step,
        grid,
        given,
        numbers,
        P=P,
        N=N,
        AT_REST=at_rest and cached is states and dense_slots is slots,
        num_warps=4,
    )
    if cached is not states:
        states.copy_(cached)
    return out


@dataclass(frozen=True)
class _Shape:
    tokens: int
    heads: int
    channels: int  # of a head
    groups: int
    d_state: int
    sequences: int

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise UserError("B", f"{self.groups} groups", f"do not divide {self.heads} heads", "a divisor of the heads")

    def tiles(self, most: int) -> dict[str, int]:
        """Channels and states of a program: powers of two, and what products take at least."""
        return {"P": min(_tile(self.channels), most), "N": _tile(self.d_state)}

    def channel_blocks(self, most: int) -> int:
        return -(-self.channels // self.tiles(most)["P"])

    def masked(self, most: int) -> bool:
        """Whether some channels or states of a tile are none."""
        tiles = self.tiles(most)
        return self.channels % tiles["P"] != 0 or self.d_state != tiles["N"]

    def geometry(self, most: int) -> tuple[int, int, int, int, int, int]:
        """What kernels are told: tokens, heads, heads of a group, channels, programs for these, d_state."""
        group_heads = self.heads // self.groups
        return self.tokens, self.heads, group_heads, self.channels, self.channel_blocks(most), self.d_state

    def grid(self, chunk: int, programs: int) -> tuple[int, int]:
        """So many programs for a chunk, and how many of these there may be (lanes_triton.py)."""
        return programs, self.tokens // chunk + self.sequences

    def chunk(self, how: SSDLaunch, device: torch.device, longest: int | None) -> int:
        """Tokens in a chunk, about, so that the GPU is full."""
        programs = self.heads * self.channel_blocks(how.channels)
        sequences = alike(self.tokens, self.sequences, longest)
        if sequences * programs >= how.programs_per_sm * multiprocessors(device):
            return self.tokens
        wanted = max(1, how.programs_per_sm * multiprocessors(device) // programs)
        return even_chunk(self.tokens, sequences, max(SHORTEST_CHUNK, self.tokens // wanted))


def _tile(size: int) -> int:
    return max(16, power_of_two(size))


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, P], copied if a row has gaps."""
    return x if x[0].is_contiguous() else x.contiguous()
