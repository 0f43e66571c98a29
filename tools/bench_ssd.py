"""Mamba-2's kernels on a GPU: right, and how fast beside Megatron-Core's and mamba-ssm's (where that is installed).

    python tools/bench_ssd.py            # Markdown
    python tools/bench_ssd.py --sweep    # and the fastest launches of a list

Errors are norms of differences over norms, against the reference's formula in float64; beside bfloat16's stands what
that formula errs with factors of products rounded to bfloat16. Times are medians of a CUDA graph's replays; what
Megatron's kernels want from the host (chunk bounds), and have tuned at their first calls, is not timed.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measure import captured, seconds

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from ssd_jobs import in_products_of

from megatron_ssm_tp.cli.console import Parser, guarded
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.ops import ssd, ssd_reference
from megatron_ssm_tp.ops.ssd_reference import NO_LIMIT

DEVICE = "cuda"


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    channels: int
    groups: int
    d_state: int


SHAPES = [
    Shape("mamba2-2.7b", 80, 64, 1, 128),
    Shape("zamba2-7b", 112, 64, 2, 64),
    Shape("mamba2-2.7b, TP=2", 40, 64, 1, 128),
    Shape("zamba2-7b, TP=2", 56, 64, 1, 64),
]


@dataclass
class Inputs:
    tokens: tuple[torch.Tensor, ...]  # x, dt, B, C
    weights: tuple[torch.Tensor, ...]  # A, D, dt_bias
    states: torch.Tensor
    slots: torch.Tensor
    cu_seqlens: torch.Tensor

    @property
    def arguments(self) -> tuple:
        x, dt, B, C = self.tokens
        A, D, dt_bias = self.weights
        return x, dt, A, B, C, D, dt_bias, NO_LIMIT


def inputs_of(shape: Shape, lengths: list[int], dtype: torch.dtype) -> Inputs:
    """A as models have it, -1 .. -16; dt mostly of 0.001 to 0.1; bands of wider rows."""
    g, total = torch.Generator(DEVICE).manual_seed(0), sum(lengths)
    sizes = [shape.heads * shape.channels, *[shape.groups * shape.d_state] * 2]
    rows = torch.randn(total, sum(sizes), device=DEVICE, generator=g).to(dtype)
    x, B, C = rows.split(sizes, 1)
    x, B, C = x.unflatten(1, (shape.heads, -1)), *(t.unflatten(1, (shape.groups, -1)) for t in (B, C))
    dt = torch.randn(total, sizes[0] + shape.heads, device=DEVICE, generator=g).to(dtype)[:, sizes[0] :]
    A = -torch.linspace(1, 16, shape.heads, device=DEVICE)
    D, dt_bias = torch.ones(shape.heads, device=DEVICE), torch.full((shape.heads,), -4.0, device=DEVICE, dtype=dtype)
    states = torch.randn(len(lengths), shape.heads, shape.channels, shape.d_state, device=DEVICE, generator=g)
    slots = torch.randperm(len(lengths), device=DEVICE, generator=g)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE, dtype=torch.int32)
    return Inputs((x, dt, B, C), (A, D, dt_bias), states, slots, cu_seqlens)


# --- Right ----------------------------------------------------------------------------------------------------------


def _error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def errors(shape: Shape, lengths: list[int], dtype: torch.dtype, chunk: int | None) -> list[float]:
    """Of y and states of prompts, then of a step after them; then, for y and states, of bfloat16 products."""
    given = inputs_of(shape, lengths, dtype)
    states, how = given.states.clone(), replace(ssd.launch_for(dtype, shape.d_state), chunk=chunk)
    y = ssd.ssd_varlen(*given.arguments, states, given.slots, given.cu_seqlens, how)
    bounds, before = given.cu_seqlens.tolist(), given.states[given.slots].double()
    true, rounded = [], []
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        x, dt, B, C = (t[None, begin:end].double() for t in given.tokens)
        A, D, dt_bias = (w.double() for w in given.weights)
        for kind, into in ((torch.float64, true), (torch.bfloat16, rounded)):
            into.append(in_products_of(kind, x, dt, A, B, C, D, dt_bias, before[i : i + 1], how.block))
    true_y, true_states = torch.cat([y[0] for y, _ in true]), torch.cat([state for _, state in true])
    step = Inputs(tuple(t[: len(lengths)] for t in given.tokens), given.weights, states, given.slots, given.cu_seqlens)
    expected = states.clone()
    expected_y = ssd_reference.ssd_step(*step.arguments, expected, step.slots).double()
    found = [_error(y, true_y), _error(states[given.slots], true_states)]
    found += [_error(ssd.ssd_step(*step.arguments, states, step.slots), expected_y), _error(states, expected.double())]
    if dtype != torch.bfloat16:
        return found
    rounded_y = torch.cat([y[0] for y, _ in rounded]).bfloat16()
    return [*found, _error(rounded_y, true_y), _error(torch.cat([state for _, state in rounded]), true_states)]


def check() -> bool:
    print("| shape | dtype | chunk | y | states | step's y | step's states | y, rounded | states, rounded |")
    print("|" + "---|" * 9)
    right = True
    odd, wide = Shape("8 groups of odd sizes", 16, 40, 8, 24), Shape("wide states", 8, 128, 1, 256)
    for shape, chunk in itertools.product([*SHAPES[:2], odd, wide], [None, 256]):
        for dtype, bound in ((torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
            found = errors(shape, [1500, 1, 64, 700, 3], dtype, chunk)
            fine = all(error < bound for error in found) and (dtype != torch.bfloat16 or found[0] < 1.02 * found[4])
            right &= fine
            cells = [f"{error:.1e}" for error in found] + [""] * (6 - len(found))
            name = f"{shape.name} | {str(dtype)[6:]} | {chunk or 'own'}"
            print(f"| {name} | {' | '.join(cells)} |{'' if fine else ' WRONG'}")
    return right


# --- Fast -----------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], object]) -> float:
    """Of a replay of `run`'s CUDA graph."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph, _ = captured(run)
    return seconds(graph.replay, torch.device(DEVICE)) * 1e3


def megatrons_prefill(given: Inputs, chunk: int) -> Callable[[], object]:
    """With chunk bounds as MambaMetadata makes them; states gathered and scattered."""
    from megatron.core.ssm.ops.ssd_combined import mamba_chunk_scan_combined_varlen

    ends, sequence, last = [0], [], []
    for i, (begin, end) in enumerate(itertools.pairwise(given.cu_seqlens.tolist())):
        cuts = [*range(begin + chunk, end, chunk), end]
        ends, sequence = ends + cuts, sequence + [i] * len(cuts)
        last.append(len(ends) - 2)
    ends, sequence, last = (torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in (ends, sequence, last))
    (x, dt, B, C), (A, D, dt_bias) = given.tokens, given.weights

    def run() -> torch.Tensor:
        out, before = torch.empty_like(x), given.states[given.slots]
        options = {"D": D, "dt_bias": dt_bias, "initial_states": before, "dt_softplus": True}
        given.states[given.slots] = mamba_chunk_scan_combined_varlen(
            x, dt, A, B, C, chunk, ends, last, sequence, out, state_dtype=torch.float32, **options
        )
        return out

    return run


def mamba_ssms_prefill(given: Inputs, chunk: int) -> Callable[[], object]:
    """All sequences as rows of a batch: they are equally long."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    (A, D, dt_bias), rows = given.weights, len(given.slots)
    x, dt, B, C = (t.unflatten(0, (rows, -1)) for t in given.tokens)

    def run() -> torch.Tensor:
        options = {"D": D, "dt_bias": dt_bias, "initial_states": given.states[given.slots], "dt_softplus": True}
        y, states = mamba_chunk_scan_combined(x, dt, A, B, C, chunk, return_final_states=True, **options)
        given.states[given.slots] = states.float()
        return y

    return run


def others_step(given: Inputs, whose: str) -> Callable[[], object]:
    if whose == "Megatron's":
        from megatron.core.ssm.ops.mamba_ssm import selective_state_update
    else:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    (x, dt, B, C), (A, D, dt_bias) = given.tokens, given.weights
    channels, d_state = given.states.shape[2:]
    A, dt = A[:, None, None].expand(-1, channels, d_state), dt[..., None].expand(-1, -1, channels)
    D, dt_bias = (w[:, None].expand(-1, channels) for w in (D, dt_bias))
    options = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "state_batch_indices": given.slots.int()}
    return lambda: selective_state_update(given.states, x, dt, A, B, C, **options)


def _attempt(name: str, make: Callable[[], Callable[[], object]]) -> str:
    try:
        return f"{milliseconds(make()):.3f}"
    except Exception as error:  # whatever stops someone else's kernels: the table says so and goes on
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr)
        return "-"


def time_prefills() -> None:
    ways = [("Megatron's", megatrons_prefill), ("mamba-ssm's", mamba_ssms_prefill)]
    print("| prefill, bfloat16, ms | prompts | ours |" + "".join(f" {n}, {c} |" for n, _ in ways for c in (128, 256)))
    print("|" + "---|" * 7)
    for shape, lengths in itertools.product(SHAPES, ([8192], [2048] * 8)):
        given = inputs_of(shape, lengths, torch.bfloat16)
        where = (given.states, given.slots, given.cu_seqlens)
        cells = [f"{milliseconds(lambda: ssd.ssd_varlen(*given.arguments, *where)):.3f}"]  # noqa: B023
        cells += [_attempt(name, lambda: make(given, c)) for name, make in ways for c in (128, 256)]  # noqa: B023
        print(f"| {shape.name} | {len(lengths)} x {lengths[0]} | {' | '.join(cells)} |")


def time_steps() -> None:
    print("| step, bfloat16, ms | requests | ours | TB/s of states | Megatron's | mamba-ssm's |")
    print("|" + "---|" * 6)
    for shape, requests in itertools.product(SHAPES[:2], (1, 16, 128)):
        given = inputs_of(shape, [1] * requests, torch.bfloat16)
        own = milliseconds(lambda: ssd.ssd_step(*given.arguments, given.states, given.slots))  # noqa: B023
        cells = [_attempt(name, lambda: others_step(given, name)) for name in ("Megatron's", "mamba-ssm's")]  # noqa: B023
        speed = 2 * given.states.nbytes / own * 1e-9
        print(f"| {shape.name} | {requests} | {own:.4f} | {speed:.2f} | {' | '.join(cells)} |")


def sweep() -> None:
    """Launches of our prefill, fastest first."""
    tiles = [(64, 64, 4), (64, 64, 8), (32, 64, 4), (64, 32, 4), (128, 64, 8)]
    kinds = list(itertools.product(tiles, (1, 2, 3), (1, 2, 3, 4)))
    for shape, lengths in itertools.product(SHAPES[:2], ([8192], [2048] * 8)):
        given, found = inputs_of(shape, lengths, torch.bfloat16), []
        where = (given.states, given.slots, given.cu_seqlens)
        for (block, channels, warps), stages, programs in kinds:
            how = ssd.SSDLaunch(block, channels, None, warps, stages, programs_per_sm=programs)
            try:
                took = milliseconds(lambda: ssd.ssd_varlen(*given.arguments, *where, how))  # noqa: B023
            except Exception as error:  # too much shared memory, mostly
                print(f"{how}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            found.append((took, how))
        print(f"\n{shape.name}, {len(lengths)} x {lengths[0]}")
        for took, how in sorted(found, key=lambda row: row[0])[:12]:
            print(f"{took:.3f} ms  {how}")


def run(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("device", "CPU", "Triton's kernels are not for it", "a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    right = check()
    print()
    time_prefills()
    print()
    time_steps()
    if arguments.sweep:
        sweep()
    if not right:
        sys.exit(1)


def read_args() -> argparse.Namespace:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sweep", action="store_true", help="time every launch of a list too")
    return made.parse_args()


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(read_args())))
