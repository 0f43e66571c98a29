"""Training's kernels on a GPU: gradients against the reference in float64, beside mamba-ssm's, and how long they take.

    python tools/check_gradients.py            # Markdown; fails if a gradient is further off than it should be
    python tools/check_gradients.py --tune     # and times of other launches

An error is the root mean square of the difference by that of the truth. The truth is computed from the same rounded
inputs, so what is left in bfloat16 is the rounding of results and, in mamba-ssm, of what lies between.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import seconds

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from grad_jobs import Case, Tensors, conv_inputs, outputs_and_gradients, scan_inputs, slopes_for, truth

from megatron_ssm_tp.cli.console import Parser, guarded
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.ops import reference
from megatron_ssm_tp.ops.conv1d_grad import causal_conv1d
from megatron_ssm_tp.ops.selective_scan_grad import GradLaunch, selective_scan

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
CASES = {
    "2 x 1000, D 512, N 16": Case(2, 1000, 512, gap=8, device="cuda"),
    "2 x 300, D 512, N 16, little forgotten": Case(2, 300, 512, steady=True, initial=True, device="cuda"),
    "3 x 77, D 250, N 5, 2 heads": Case(3, 77, 250, 5, 2, initial=True, device="cuda"),
    "1 x 4096, D 256, N 16": Case(1, 4096, 256, device="cuda"),
    "1 x 130, D 96, N 64": Case(1, 130, 96, 64, device="cuda"),
    "1 x 130, D 40, N 128": Case(1, 130, 40, 128, device="cuda"),
}
TIMED = {"1 x 8192": Case(1, 8192, 4096, device="cuda"), "8 x 2048": Case(8, 2048, 4096, device="cuda")}
LAUNCHES = [
    *({"programs": programs, "max_registers": registers} for programs, registers in ((8, None), (16, 128), (24, 168))),
    *({"sub": sub} for sub in (4, 16)),
    *({"chunk": chunk} for chunk in (32, 128)),
    {"tile": 1024, "warps": 2},
    {"tile": 256, "programs": 16, "max_registers": 128},
]


def mambas_scan(x, dt, A, B, C, D, z, dt_bias, initial=None) -> tuple[torch.Tensor, torch.Tensor]:
    """mamba-ssm's, with the arguments of ours; it has channels before tokens, and a float32 bias."""
    x, dt, z = (t.transpose(1, 2).contiguous() for t in (x, dt, z))
    B, C = ((t if t.dim() == 4 else t.unsqueeze(2)).permute(0, 2, 3, 1).contiguous() for t in (B, C))
    y, final = selective_scan_fn(x, dt, A, B, C, D, z, dt_bias.float(), True, True)
    return y.transpose(1, 2), final


def mambas_scan_alone(x, dt, A, B, C, D, z, dt_bias, initial=None) -> tuple[torch.Tensor, None]:
    """The same of tensors that are as it wants them."""
    return selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, True), None


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def compare(name: str, case: Case, operators: dict[str, Callable], given: Tensors, final_width: int) -> bool:
    """Print errors of all operators but the first, which is the truth; whether the second's are within limits."""
    slopes = slopes_for(given, ("y", "final") if case.initial else ("y",), final_width)
    (_, reference_of), *others = operators.items()
    expected, good = truth(reference_of, given, slopes), True
    for who, operator in others:
        found = outputs_and_gradients(operator, given, slopes)
        wanted = {n: t for n, t in expected.items() if t is not None}
        errors = {n: error(found[n], t) for n, t in wanted.items() if found.get(n) is not None}
        if who == others[0][0]:  # NaN is no error within limits, nor is a gradient that is missing
            good = errors.keys() == wanted.keys() and all(e <= LIMITS[case.dtype] for e in errors.values())
        row = ", ".join(f"{n} {value:.1e}" for n, value in errors.items())
        print(f"| {name} | {str(case.dtype)[6:]} | {who} | {row} |", flush=True)
    return good


def check() -> bool:
    print("| tokens and channels | dtype | whose | errors |\n|---|---|---|---|")
    good = True
    for name, case in CASES.items():
        for dtype in LIMITS if case.d_state == 16 else (torch.float32,):
            same = Case(**vars(case) | {"dtype": dtype})
            scans = {"truth": reference.selective_scan, "ours": selective_scan}
            if selective_scan_fn and not case.initial:
                scans["mamba-ssm"] = mambas_scan
            good &= compare(f"scan {name}", same, scans, scan_inputs(same), case.d_state)
            convolutions = {"truth": reference.causal_conv1d, "ours": causal_conv1d}
            good &= compare(f"convolution {name}", same, convolutions, conv_inputs(same, 4, True), 4)
    return good


def time_one(name: str, who: str, operator: Callable, given: Tensors) -> None:
    """Print milliseconds of forward, of both, and of memory the most that both hold beside their arguments."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in given.values()]

    def both() -> None:
        y = operator(*leaves)[0]
        torch.autograd.grad(y, [t for t in leaves if t is not None], torch.ones_like(y))

    try:
        both()
    except Exception as problem:  # of a launch that this GPU has no room for: the others are wanted all the same
        print(f"| {name} | {who} | {type(problem).__name__} | | |", flush=True)
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    forward, whole = (seconds(run, torch.device("cuda")) * 1e3 for run in (lambda: operator(*leaves), both))
    print(f"| {name} | {who} | {forward:.2f} | {whole:.2f} | {peak:.0f} |", flush=True)


def take_times(tune: bool) -> None:
    print("\n| D 4096, bfloat16 | whose | forward, ms | and backward, ms | memory, MiB |\n|---|---|---|---|---|")
    for name, case in TIMED.items():
        case = Case(**vars(case) | {"dtype": torch.bfloat16})
        given = scan_inputs(case)
        time_one(f"scan {name}", "ours", selective_scan, given)
        for launch in LAUNCHES if tune else []:
            how = GradLaunch(**launch)
            time_one(f"scan {name}", str(launch), lambda *a, how=how: selective_scan(*a, how), given)
        if selective_scan_fn:
            turned = {
                n: t.transpose(1, 2).contiguous() if n in ("x", "dt", "B", "C", "z") else t for n, t in given.items()
            }
            turned["dt_bias"] = given["dt_bias"].float()
            time_one(f"scan {name}", "mamba-ssm", mambas_scan_alone, turned)
        time_one(f"convolution {name}", "ours", causal_conv1d, conv_inputs(case, 4, True))


def show_kernels() -> None:
    """Print what the time of one forward and backward consists of."""
    given = scan_inputs(Case(**vars(TIMED["1 x 8192"]) | {"dtype": torch.bfloat16}))
    slopes = slopes_for(given, ("y",), 16)
    outputs_and_gradients(selective_scan, given, slopes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        outputs_and_gradients(selective_scan, given, slopes)
        torch.cuda.synchronize()
    print("\n| kernel, 1 x 8192 | calls | ms |\n|---|---|---|")
    for event in sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:12]:
        print(f"| {event.key[:60]} | {event.count} | {event.self_device_time_total / 1000:.3f} |")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="also time other launches")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("device", "CPU", "has no such kernels", "a CUDA GPU")
    theirs = "mamba-ssm" if selective_scan_fn else "no mamba-ssm"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {theirs}\n")
    good = check()
    take_times(arguments.tune)
    show_kernels()
    print("\nAll errors are within their limits." if good else "\nErrors above their limits.")
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(guarded(main))
