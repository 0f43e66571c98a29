"""Random all-reduces for minutes: each result the same bits on all ranks, and as near the exact sum as its recipe says.

    torchrun --standalone --nproc-per-node 2 tools/soak_allreduce.py --minutes 2    # ends with PASS or FAIL

Sizes, strides, dtypes, recipes, backends, process groups and fused calls are drawn from a seed that the ranks share,
and what comm.exchange does among them. A batch is some calls in a row, then their checks; on GPUs some batches are
captured in CUDA graphs, kept, and replayed with new inputs in random order between the others, up to 10 times without a
pause. Of such a burst every replay is compared between ranks, the last one also with the exact sums.

To see what the others do when a rank is gone, the last one can kill itself. torchrun must not be quicker than they are:

    torchrun --standalone --nproc-per-node 2 --monitor-interval 90 tools/soak_allreduce.py --kill-after 5 --timeout-s 20
"""

import argparse
import os
import signal
import sys
import threading
from random import Random
from time import monotonic

import torch
import torch.distributed as dist

from megatron_ssm_tp import quiet_imports

with quiet_imports():
    from measure import captured, conditions, in_words, prepare_symmetric, start
    from soak_calls import Call, Choices, checksum
    from soak_exchanges import Exchange, draw_exchange
    from soak_report import Record, Report

    from megatron_ssm_tp.cli.console import RUN_ERROR, Parser, guarded, leave, say
    from megatron_ssm_tp.comm.backends import BACKENDS
    from megatron_ssm_tp.comm.recipes import Bf16
    from megatron_ssm_tp.errors import PeerLostError, UserError, renamed
    from megatron_ssm_tp.ranks import agree, lost_peers_reported

_GRAPHS = 8  # kept at a time
_IN_A_ROW = 1 << 20  # most values of a call that is not alone in its batch
_EXCHANGED = 128  # calls whose checksums travel at once

Group = tuple[tuple[int, ...], dist.ProcessGroup]


class Batch:
    """Calls in a row, all on one stream, and then their checks; in a CUDA graph if `graph`.

    A call that is refused (UserError, on every rank alike) is left out of the graph.
    """

    def __init__(self, calls: list[Call | Exchange], groups: list[Group], device: torch.device) -> None:
        self.calls, self.device = calls, device
        mine = [dist.get_rank() in groups[call.group][0] for call in calls]
        self.prepared = [
            call.prepare(*groups[call.group], device) if member else None
            for call, member in zip(calls, mine, strict=True)
        ]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.results: list[tuple[torch.Tensor, ...] | None] = []
        self.sums: list[torch.Tensor | None] = []

    def fill(self, seed: int) -> None:
        for index, prepared in enumerate(self.prepared):
            if prepared is not None:
                prepared.fill(seed + index)

    def run(self) -> None:
        """Make the calls, and take checksums of their results."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()

    def _run(self) -> None:
        self.results = []
        for index, prepared in enumerate(self.prepared):
            try:
                self.results.append(prepared.run() if prepared is not None else None)
            except UserError:
                self.results.append(None)
                self.prepared[index] = None
        self.sums = [checksum(result) if result is not None else None for result in self.results]

    def capture(self) -> None:
        """From now on `run` replays. Calls have been made once before."""
        if any(prepared is not None for prepared in self.prepared):
            self.results, self.sums = [], []
            self.graph, _ = captured(self._run)

    def found(self, exactly: bool) -> list[torch.Tensor]:
        """Of each call int64 [3], see Record; its error is 0 unless looked at `exactly`."""
        rows = []
        for prepared, result, total in zip(self.prepared, self.results, self.sums, strict=True):
            if prepared is None or result is None:
                rows.append(torch.zeros(3, dtype=torch.int64, device=self.device))
                continue
            off = prepared.off(result) if exactly else torch.zeros((), dtype=torch.float64, device=self.device)
            rows.append(torch.stack([torch.ones_like(total), total, off.view(torch.int64)]))
        return rows


class Soak:
    """The draws, the graphs that are kept, and the records that were not exchanged yet."""

    def __init__(self, choices: Choices, groups: list[Group], device: torch.device, seed: int, most: int) -> None:
        self.choices, self.groups, self.device, self.most = choices, groups, device, most
        self.rng = Random(seed)
        self.graphs: list[Batch] = []
        self.records: list[Record] = []
        self.report = Report()
        self.made, self.told = 0, monotonic()

    def step(self) -> None:
        """A new batch, or a burst of replays."""
        draw = self.rng.random()
        if self.graphs and draw < 0.7:
            self._make(self.rng.choice(self.graphs), "graph", self.rng.choice([1, 1, 1, 3, 10]))
            return
        count = self.rng.choice([1, 1, 2, 4, 8])
        most = self.most if count == 1 else min(self.most, _IN_A_ROW)
        in_graph = self.device.type == "cuda" and self.rng.random() < 0.15
        most = min(most, _IN_A_ROW) if in_graph else most  # graphs keep their memory
        batch = Batch([self._draw(most) for _ in range(count)], self.groups, self.device)
        self._make(batch, "eager", 1)
        if in_graph:
            batch.capture()
            if len(self.graphs) == _GRAPHS:
                self.graphs.pop(self.rng.randrange(_GRAPHS))
            self.graphs.append(batch)

    def _draw(self, most: int) -> Call | Exchange:
        if self.rng.random() < 0.15:
            return draw_exchange(self.rng, self.choices.groups, self.choices.backends, self.choices.block_sizes)
        return self.choices.draw(self.rng, most)

    def _make(self, batch: Batch, mode: str, times: int) -> None:
        batch.fill(self.rng.getrandbits(40))
        for left in reversed(range(times)):
            batch.run()
            for call, found in zip(batch.calls, batch.found(exactly=left == 0), strict=True):
                self.records.append(Record(call, mode, self.made, found))
                self.made += 1

    def exchange(self, stop: bool) -> bool:
        """Compare what was recorded between ranks. Whether any rank says stop."""
        mine = torch.stack([*(r.found for r in self.records), torch.full((3,), int(stop), device=self.device)])
        gathered = mine.new_empty(dist.get_world_size() * mine.numel())
        dist.all_gather_into_tensor(gathered, mine.view(-1))
        *rows, stops = gathered.view(-1, *mine.shape).transpose(0, 1).cpu()
        for record, row in zip(self.records, rows, strict=True):
            ranks = self.groups[record.call.group][0]
            ratios = row[:, 2].contiguous().view(torch.float64)
            found = [(int(row[rank, 0]), int(row[rank, 1]), float(ratios[rank])) for rank in ranks]
            self.report.add(record, ranks, found)
        self.records = []
        return bool(stops.any())

    def tell(self, left: float) -> None:
        """On stderr, every half minute: a run that ends early has shown what it had done until then."""
        if dist.get_rank() == 0 and monotonic() > self.told + 30:
            self.told = monotonic()
            done = f"{self.report.calls.total()} calls, {len(self.report.failures)} failures, {max(0, left):.0f} s left"
            print(done, file=sys.stderr, flush=True)

    def run(self, seconds: float, most_calls: int | None) -> Report:
        """Until the time is up, or so many calls are made."""
        deadline, over = monotonic() + seconds, False
        while not over:
            while len(self.records) < _EXCHANGED:
                self.step()
            over = self.exchange(monotonic() > deadline or (most_calls is not None and self.made >= most_calls))
            self.tell(deadline - monotonic())
        self.graphs.clear()
        return self.report


def make_groups() -> list[Group]:
    """All ranks twice; of more than two also the first two, and all but the first."""
    everyone = tuple(range(dist.get_world_size()))
    groups = [everyone, *([everyone[:2], everyone[1:]] if len(everyone) > 2 else [])]
    return [(everyone, dist.group.WORLD), *((ranks, dist.new_group(list(ranks))) for ranks in groups)]


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=1.0, metavar="M")
    made.add_argument("--calls", type=int, metavar="N", help="end after about so many, if that is earlier")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn")
    made.add_argument("--max-values", type=int, metavar="N", help="largest tensor (default: 2^24; on CPUs 2^16)")
    made.add_argument("--backends", nargs="+", metavar="NAME", help="default: auto and all there are")
    made.add_argument("--block-sizes", type=int, nargs="+", default=[128, 32], metavar="N")
    made.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="to wait for another rank")
    made.add_argument("--kill-after", type=float, metavar="S", help="the last rank kills itself then")
    return made.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises UserError: an option's value."""
    for size in args.block_sizes:
        with renamed("--block-sizes"):
            Bf16(block_size=size)
    for option in ("minutes", "calls", "max_values", "timeout_s", "kill_after"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise UserError(f"--{option.replace('_', '-')}", value, "leaves nothing to do", "numbers above 0")
    for name in args.backends or ():
        with renamed("--backends"):
            Bf16(backend=name)


def soak(args: argparse.Namespace, device: torch.device) -> Report:
    """All of it, in the ranks that `start` has joined."""
    groups, rank = make_groups(), dist.get_rank()
    missing = prepare_symmetric([group for ranks, group in groups if rank in ranks], device, args.timeout_s)
    there = [name for name in BACKENDS if name != "symmetric" or not missing]
    if missing and "symmetric" in (args.backends or ()):
        raise UserError("--backends", "symmetric", missing, ", ".join(("auto", *there)))
    say(f"{in_words(conditions(device))}; seed {args.seed}, {len(groups)} groups")
    if missing:
        say(f"Without symmetric ({missing}).\n")
    names = tuple(args.backends or ("auto", *there))
    choices = Choices(len(groups), names, tuple(args.block_sizes))
    most = args.max_values or (1 << 24 if device.type == "cuda" else 1 << 16)
    dist.barrier()
    return Soak(choices, groups, device, args.seed, most).run(args.minutes * 60, args.calls)


def kill_later(seconds: float) -> float:
    """The last rank ends in so many seconds, in the middle of whatever it does. When that will be."""
    if dist.get_rank() == dist.get_world_size() - 1:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    return monotonic() + seconds


def run(args: argparse.Namespace) -> None:
    device = start(args.timeout_s)
    agree(lambda: check(args), dist.group.WORLD)
    killed = kill_later(args.kill_after) if args.kill_after is not None else None
    try:
        with torch.no_grad(), lost_peers_reported():
            report = soak(args, device)
    except RuntimeError as error:
        if killed is None:
            raise
        # CUDA's own errors among them: a kernel that gave its peer up ends in one
        said, late = str(error).strip().splitlines()[0], monotonic() - killed
        line = said if isinstance(error, PeerLostError) else f"rank {dist.get_rank()}: {said}"
        print(f"error: {line}, {late:.1f} s after the kill", file=sys.stderr, flush=True)
        leave(RUN_ERROR)
    say(report.in_words())
    dist.barrier()
    dist.destroy_process_group()
    if not report.passed:
        sys.exit(RUN_ERROR)


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(read_args())))
