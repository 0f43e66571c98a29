"""Are the Triton operators right on this GPU: against ops/reference.py in float64, beside mamba-ssm where it is there.

    python tools/check_ops.py             # a line a case; ends with PASS or FAIL, and status 1
    python tools/check_ops.py --small     # on a CPU: few small cases, in Triton's interpreter

Prompts of 1 to 65536 tokens, alone and packed in mixed lengths; a short one split everywhere, long ones at random;
d_state 8 to 128; odd channel counts; with and without states before; one-token steps. For each the error of y and of
the states (norm of the difference by that of the truth), and the worst value's. In bfloat16 y may be off by no more
than 1.1 times what mamba-ssm's or causal-conv1d's is, where there are enough values to tell, and than rounding.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from time import perf_counter
from typing import NamedTuple

import torch
from measure import version_of
from op_cases import Case, Given, as_packed, call, draw, exact, ours, part, relative, rival, worst

from megatron_ssm_tp.cli.console import Parser, guarded, say
from megatron_ssm_tp.errors import UserError

FLOAT, HALF = torch.float32, torch.bfloat16
# How far y may be off, in norm and in the worst value. Kernels compute some decays to 3e-6, and a state remembers
# hundreds of tokens; bfloat16 rounds by up to 2^-9, float16 by 2^-12. States are float32, or inputs as they were.
LIMITS = {FLOAT: (5e-5, 5e-4), HALF: (3e-3, 2**-7), torch.float16: (4e-4, 2**-10)}
WORSE_THAN_RIVAL = 1.1
ENOUGH_VALUES = 4096  # below it, chance decides whose rounding is the luckier
EDGES = (1, 2, 3, 7, 8, 9, 31, 33, 63, 64, 65, 95, 97, 127, 129, 255, 257, 513, 1000, 1023, 1025, 2049, 4097)
LONG = (8192, 16384, 32767, 65536)
MIXED = ((1, 2, 3), (5, 1, 300, 64, 1), (1000, 3, 129, 2048), (1,) * 70 + (65,) * 70, (2048,) * 8, (4000, 97))
SMALL = ((1,), (2,), (19, 3), (45,), (1, 1, 9))


class Checked(NamedTuple):
    """Errors of a case: y's and the states' in norm, the worst value's of both, and the rival's y's."""

    y: float
    state: float
    worst: float
    theirs: float | None = None
    problem: str = ""

    def verdict(self, case: Case) -> str:
        """What is wrong, or nothing."""
        in_norm, at_worst = LIMITS[case.dtype]
        of_state = LIMITS[FLOAT][0]
        found = [self.problem] if self.problem else []
        if not self.y <= in_norm or not self.worst <= at_worst:
            found.append(f"y is off by more than {in_norm:.0e}, or a value by more than {at_worst:.1e}")
        if not self.state <= of_state:
            found.append(f"states are off by more than {of_state:.0e}")
        enough = case.dtype == HALF and sum(case.lengths) * case.channels >= ENOUGH_VALUES
        if self.theirs is not None and enough and not self.y <= WORSE_THAN_RIVAL * self.theirs:
            found.append(f"y is off by more than {WORSE_THAN_RIVAL} times theirs")
        return "; ".join(found)


class Work(NamedTuple):
    """A case, and for single prompts where it is cut: one call each for the parts of each of these lists."""

    case: Case
    cuts: tuple[tuple[int, ...], ...] = ((),)


def small_work() -> Iterator[Work]:
    for dtype in (FLOAT, HALF):
        for lengths in SMALL:
            yield Work(Case("scan", lengths, 7, dtype=dtype, initial=dtype == FLOAT, steady=len(lengths) == 2))
            yield Work(Case("conv", lengths, 33, 4, dtype, initial=True))
        yield Work(Case("scan step", (1, 1, 1), 33, dtype=dtype, initial=True))
        yield Work(Case("conv step", (1, 1, 1), 33, 4, dtype, initial=True))
    for d_state in (8, 64, 128):
        yield Work(Case("scan", (9, 3), 5, d_state, FLOAT))
    for op, width in (("scan", 16), ("conv", 4)):
        yield Work(Case(op, (9,), 7, width, FLOAT, initial=True), tuple((at,) for at in range(1, 9)))


def all_work() -> Iterator[Work]:
    """Initial states are zero where a rival can be asked, which takes none. Channel counts are few: the kernels are
    compiled anew for each."""
    for dtype in (FLOAT, HALF):
        for length in EDGES:
            yield Work(Case("scan", (length,), 256, dtype=dtype, seed=length))
            yield Work(Case("conv", (length,), 256, 4, dtype, seed=length))
        for length in LONG:
            for steady in (False, True):
                yield Work(Case("scan", (length,), 64, dtype=dtype, steady=steady))
            yield Work(Case("conv", (length,), 64, 4, dtype))
        for index, lengths in enumerate(MIXED):
            yield Work(Case("scan", lengths, 256, dtype=dtype, initial=True, steady=index % 2 == 1))
            yield Work(Case("conv", lengths, 256, 2 + index % 3, dtype, initial=True))
        for channels in (1, 3, 65, 1001):
            yield Work(Case("scan", (300, 41), channels, dtype=dtype, initial=True))
            yield Work(Case("conv", (300, 41), channels, 4, dtype, initial=True))
        for d_state in (5, 8, 64, 128):
            yield Work(Case("scan", (700,), 65, d_state, dtype))
            yield Work(Case("scan", (700, 20, 131), 65, d_state, dtype, initial=True))
        yield Work(Case("scan", (1024,), 8192, dtype=dtype))
        for requests, channels, d_state in ((1, 8192, 16), (8, 5120, 16), (64, 257, 16), (5, 33, 8), (3, 64, 128)):
            yield Work(Case("scan step", (1,) * requests, channels, d_state, dtype, initial=True))
            yield Work(Case("conv step", (1,) * requests, channels, 4, dtype, initial=True))
        yield from _splits(dtype)
    for dtype in (HALF, torch.float16):
        for channels in (8192, 8200):
            yield Work(Case("conv", (1000, 24), channels, 4, dtype))
    for lengths in ((1,), (63,), (513, 20), (4097,)):
        yield Work(Case("scan", lengths, 256, dtype=torch.float16))
        yield Work(Case("conv", lengths, 256, 4, torch.float16))
    for requests in (1, 8):
        yield Work(Case("scan step", (1,) * requests, 512, dtype=torch.float16, initial=True))
        yield Work(Case("conv step", (1,) * requests, 512, 4, torch.float16, initial=True))


def _splits(dtype: torch.dtype) -> Iterator[Work]:
    """Every split of 97 tokens in two; 20 of 5000 in up to six."""
    rng = Random(1)
    in_two = tuple((at,) for at in range(1, 97))
    at_random = tuple(tuple(sorted(rng.sample(range(1, 5000), rng.randint(1, 5)))) for _ in range(20))
    for op, width in (("scan", 16), ("conv", 4)):
        yield Work(Case(op, (97,), 64, width, dtype, initial=True), in_two)
        yield Work(Case(op, (5000,), 64, width, dtype, initial=True, steady=True), at_random)


def checked(work: Work, device: torch.device) -> Checked:
    """The errors of a case; of its largest ones where it is cut in several ways."""
    case, given = work.case, draw(work.case, device)
    y, states = exact(case, given)
    problem, errors = "", []
    for cuts in work.cuts:
        found, left, wrong = _run(case, given, cuts)
        problem = problem or wrong
        errors.append((relative(found, y), relative(left, states), max(worst(found, y), worst(left, states))))
    theirs = rival(case, given)
    beside = relative(as_packed(case, theirs()), y) if theirs else None
    return Checked(*(max(column) for column in zip(*errors, strict=True)), beside, problem)


def _run(case: Case, given: Given, cuts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, str]:
    """y, the states after it, and what was written that should not be."""
    copied = given._replace(states=given.states.clone(), leading=tuple(t.clone() for t in given.leading))
    bounds = (0, *cuts, sum(case.lengths))
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN: who reads what nobody wrote is seen
    try:
        if cuts:
            y = torch.cat([call(case, ours(case), part(case, copied, *span)) for span in pairwise(bounds)])
        else:
            y = call(case, ours(case), copied)
    finally:
        torch.use_deterministic_algorithms(False)
    idle = [slot for slot in range(len(given.states)) if slot not in given.slots.tolist()]
    problem = ""
    if not torch.equal(copied.states[idle], given.states[idle]):
        problem = "a slot of no request was written"
    if any(not torch.equal(a, b) for a, b in zip(copied.leading, given.leading, strict=True)):
        problem = "inputs were written"
    if y.dtype != case.dtype:
        problem = f"y is {y.dtype}"
    return y, copied.states, problem


def line(work: Work, found: Checked) -> str:
    case = work.case
    lengths = ", ".join(map(str, case.lengths[:6])) + (f".. ({len(case.lengths)})" if len(case.lengths) > 6 else "")
    flags = [name for name in ("initial", "steady") if getattr(case, name)]
    if work.cuts != ((),):
        flags.append(f"split in {len(work.cuts)} ways")
    beside = f" (theirs {found.theirs:.2e})" if found.theirs is not None else ""
    shape = f"{case.op:9} {str(case.dtype).removeprefix('torch.'):8} D {case.channels:<4} N {case.width:<3} T {lengths}"
    errors = f"y {found.y:.2e}{beside}, states {found.state:.2e}, worst {found.worst:.1e}"
    wrong = found.verdict(case)
    return f"{' '.join([shape, *flags]):75} {errors}  {f'WRONG: {wrong}' if wrong else 'ok'}"


def check_all(works: Iterator[Work], device: torch.device) -> list[str]:
    """Prints a line a case; returns those that are wrong."""
    failures = []
    for work in works:
        try:
            found = checked(work, device)
        except Exception as error:  # whatever a kernel raises: the others are checked all the same
            found = Checked(float("inf"), float("inf"), float("inf"), None, " ".join(str(error).split())[:200])
        said = line(work, found)
        say(said)
        if found.verdict(work.case):
            failures.append(said)
    return failures


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--small", action="store_true", help="few small cases; on a CPU in Triton's interpreter")
    return made.parse_args(argv)


def prepare(args: argparse.Namespace) -> torch.device:
    """The GPU; or the CPU, with Triton made to interpret.

    Raises:
        UserError: there is no GPU for all cases.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not args.small:
        raise UserError("--small", False, "all cases need a GPU", "--small on a CPU")
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from interpreter import patch_interpreter

    patch_interpreter()
    return torch.device("cpu")


def run(args: argparse.Namespace) -> int:
    device, began = prepare(args), perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter on a CPU"
    versions = ", ".join(f"{package} {version_of(package)}" for package in ("triton", "mamba-ssm", "causal-conv1d"))
    say(f"{name}, torch {torch.__version__}, {versions}\n")
    works = list(small_work() if args.small else all_work())
    with torch.no_grad():
        failures = check_all(iter(works), device)
    if failures:
        say("\nWrong:\n" + "\n".join(failures))
    verdict = "FAIL" if failures else "PASS"
    say(f"\n{verdict}: {len(works)} cases, {len(failures)} wrong, {perf_counter() - began:.0f} s")
    return 1 if failures else 0


def main() -> int:
    status = []
    return guarded(lambda: status.append(run(read_args()))) or status[0]


if __name__ == "__main__":
    sys.exit(main())
