"""Mamba-1's selective scan in training on GPUs: reference.selective_scan, forward and backward, as Triton kernels.

Forward keeps the state of every CHUNK tokens, float32: at d_state 16 half the bytes of x in bfloat16. Backward finds
the states between them anew, a few tokens at a time, and needs beside the gradients themselves: as much once more for
the carries at chunks' ends and once for the sums of dA, the states of a few tokens a program, and B's and C's gradients
by groups of channels. All sums are made in one order: results do not differ from run to run.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch.autograd.function import once_differentiable

from . import reference
from .launching import last_axis_dense, multiprocessors
from .selective_scan import ScanShape, packed_bc
from .selective_scan_back_triton import backward_chunks
from .selective_scan_carry_triton import carry_chunks
from .selective_scan_grad_triton import forward_chunks, join_chunks

Grads = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class GradLaunch:
    """How the kernels of a training step are launched.

    Args:
        chunk: tokens between the states that forward keeps; chunks are independent of each other.
        sub: tokens whose states backward holds at once; divides `chunk`.
        programs: of backward, for each multiprocessor: that many hold states.
        tile: channels times states of a program of backward.
        warps: of such a program.
        max_registers: of a thread of it.
        group_blocks: how many blocks of channels a program takes one after the other, adding up their gradients of B
            and C; None is what `group_blocks_for` finds.
    """

    chunk: int = 64
    sub: int = 8
    programs: int = 12
    tile: int = 512
    warps: int = 1
    max_registers: int | None = 168
    group_blocks: int | None = None


@cache
def group_blocks_for(slots: int, blocks: int, programs: int) -> int:
    """How many of the `blocks` of channels of each of `slots` a program takes one after the other.

    As many as leave the longest program within a twentieth of the least: each group has its own gradient of B and C.
    """

    def longest(size: int) -> int:
        return -(-slots * -(-blocks // size) // programs) * size

    sizes = range(1, blocks + 1)
    least = min(map(longest, sizes))
    return max(size for size in sizes if 20 * longest(size) <= 21 * least)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    initial: torch.Tensor | None = None,
    how: GradLaunch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = (C_t h_t + D x_t) silu(z_t), with dt = softplus(dt + dt_bias).

    Args:
        x, dt, z: [b, l, D], bfloat16, float16 or float32; any strides.
        A: [D, N]. B, C: [b, l, N], or [b, l, H, N] for H equal runs of channels; any strides. D, dt_bias: [D].
        initial: [b, D, N]; None is zeros.

    Returns:
        y [b, l, D] in x's dtype, and the state after the last token, float32 [b, D, N]. Both are differentiable, once,
        by every argument.
    """
    if not x.numel():
        return reference.selective_scan(x, dt, A, B, C, D, z, dt_bias, initial)
    return _SelectiveScan.apply(x, dt, A, B, C, D, z, dt_bias, initial, how or GradLaunch())


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, initial, how):
        ctx.set_materialize_grads(False)
        given = _Given(x, dt, A, B, C, D, z, dt_bias, how)
        y, starts, final = _forward(given, initial)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, starts)
        ctx.how, ctx.initial_dtype = how, None if initial is None else initial.dtype
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        if dy is None and dfinal is None:
            return (None,) * 10
        *tensors, starts = ctx.saved_tensors
        grads = _backward(_Given(*tensors, ctx.how), starts, dy, dfinal, ctx.initial_dtype)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return (*(grad if needed else None for grad, needed in wanted), None)


class _Given:
    """A call's tensors as kernels take them, and its dimensions."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, how: GradLaunch) -> None:
        self.like = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
        self.batch, self.length, channels = x.shape
        self.how, self.chunks = how, -(-self.length // how.chunk)
        tokens = self.batch * self.length
        self.shape = ScanShape(tokens, self.batch, channels, 1 if B.dim() == 3 else B.shape[2], A.shape[1])
        self.x, self.dt, self.z = (last_axis_dense(t) for t in (x, dt, z))
        self.A, self.D, self.dt_bias = A.float().contiguous(), D.contiguous(), dt_bias.contiguous()
        self.BC = packed_bc(B.transpose(0, 1).flatten(0, 1), C.transpose(0, 1).flatten(0, 1), self.shape)  # l before b

    @property
    def slots(self) -> int:
        return self.batch * self.chunks

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.length, self.chunks, self.batch

    def rows_like(self, x: torch.Tensor) -> torch.Tensor:
        """[b, l, D] of x's dtype, dense as [l, b, D]: the order of a model's activations."""
        return x.new_empty(self.length, self.batch, self.shape.channels).transpose(0, 1)

    def by_slot(self, *shape: int) -> torch.Tensor:
        return self.A.new_empty(self.slots, self.shape.channels, *shape)

    def join(self, edges: torch.Tensor, steps: torch.Tensor, first, last, reverse: bool) -> None:
        values, block = self.A.numel(), 128
        join_chunks[self.batch, -(-values // block)](
            *(edges, steps, self.A, first, last, self.chunks, self.shape.channels, self.shape.d_state),
            REVERSE=reverse,
            BLOCK=block,
            num_warps=block // 32,
        )


def _forward(given: _Given, initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [b, l, D], states at chunks' starts [slots, D, N], and at the end [b, D, N]."""
    shape, x, dt, z = given.shape, given.x, given.dt, given.z
    y, starts, steps = given.rows_like(x), given.by_slot(shape.d_state), given.by_slot()
    final = starts.new_empty(given.batch, shape.channels, shape.d_state)
    lanes = shape.lanes(1)
    options = {"CHUNK": given.how.chunk, "N": shape.padded, "LANES": lanes, "MASKED": shape.masked(lanes)}
    tensors = (x, dt, z, y, given.A, given.BC, given.D, given.dt_bias, starts, steps)
    strides = (*x.stride()[:2], *dt.stride()[:2], *z.stride()[:2])
    for states_only, polynomial in ((True, 3), (False, 2)):
        forward_chunks[shape.grid(lanes, given.slots)[::-1]](
            *(*tensors, *given.numbers, *shape.geometry(lanes), *strides),
            **options,
            STAGES=3,
            POLYNOMIAL=polynomial,
            STATES_ONLY=states_only,
            num_warps=1,
            maxnreg=128,
        )
        if states_only:
            given.join(starts, steps, None if initial is None else initial.contiguous(), final, reverse=False)
    return y, starts, final


def _backward(given: _Given, starts, dy, dfinal, initial_dtype: torch.dtype | None) -> Grads:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and of the initial states (None where there were none)."""
    shape, how, x, dt, z = given.shape, given.how, given.x, given.dt, given.z
    dy = x.new_zeros(x.shape) if dy is None else last_axis_dense(dy)
    width = max(1, how.tile // shape.padded)  # channels of a program
    head_blocks = -(-shape.head_channels // width)
    geometry = (shape.channels, shape.heads, shape.head_channels, head_blocks)
    constants = {"CHUNK": how.chunk, "N": shape.padded, "CHANNELS": width, "num_warps": how.warps}
    ends, dinitial = _carries(given, dy, dfinal, initial_dtype, geometry, constants)
    wanted, items = multiprocessors(x.device) * how.programs, given.slots * shape.heads
    group_blocks = how.group_blocks or group_blocks_for(items, head_blocks, wanted)
    groups = -(-head_blocks // group_blocks)
    programs = min(wanted, items * groups)
    scratch = starts.new_empty(programs, how.chunk // how.sub + how.sub, width * shape.padded)
    dx, ddt, dz = (given.rows_like(t) for t in (x, dt, z))
    dA, dD, dbias = given.by_slot(shape.d_state), given.by_slot(), given.by_slot()
    dBC = starts.new_empty(groups, given.length, given.batch, shape.heads, 2, shape.padded)
    backward_chunks[programs,](
        *(x, dt, z, dy, given.A, given.BC, given.D, given.dt_bias, starts, ends, scratch),
        *(dx, ddt, dz, dA, dBC, dD, dbias, *given.numbers, *geometry, groups, group_blocks, shape.d_state),
        *(stride for t in (x, dt, z, dy) for stride in t.stride()[:2]),
        SUB=how.sub,
        maxnreg=how.max_registers,
        **constants,
    )
    dB, dC = dBC.sum(0)[..., : shape.d_state].transpose(0, 1).unbind(-2)  # [b, l, H, N]
    found = {"A": dA.sum(0), "B": dB, "C": dC, "D": dD.sum(0), "dt_bias": dbias.sum(0)}
    found = {name: grad.reshape(given.like[name].shape).to(given.like[name].dtype) for name, grad in found.items()}
    return dx, ddt, found["A"], found["B"], found["C"], found["D"], dz, found["dt_bias"], dinitial


def _carries(
    given: _Given, dy, dfinal, initial_dtype: torch.dtype | None, geometry: tuple, constants: dict
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Carries at chunks' ends [slots, D, N], and before the first: the initial states' gradient [b, D, N], or None."""
    shape, dt, z = given.shape, given.dt, given.z
    ends, steps = given.by_slot(shape.d_state), given.by_slot()
    carry_chunks[given.slots, shape.heads * geometry[-1]](
        *(dt, z, dy, given.A, given.BC, given.dt_bias, ends, steps, *given.numbers, *geometry, shape.d_state),
        *(stride for t in (dt, z, dy) for stride in t.stride()[:2]),
        **constants,
    )
    dinitial = None
    if initial_dtype is not None:
        dinitial = ends.new_empty(given.batch, shape.channels, shape.d_state, dtype=initial_dtype)
    given.join(ends, steps, None if dfinal is None else dfinal.contiguous(), dinitial, reverse=True)
    return ends, dinitial
