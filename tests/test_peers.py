"""The watch that NCCL needs to notice a dead peer; here over gloo, where a sleep plays the waiting kernel."""

import multiprocessing as mp
import os
import time
from pathlib import Path

import pytest


def _rank(rank: int, size: int, store: str, behaviour: str) -> None:
    import torch.distributed as dist

    from megatron_ssm_tp.inference.peers import PeerWatch

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    watch = PeerWatch(dist.group.WORLD)
    dist.barrier()
    if rank == 1:
        os._exit(9)
    if behaviour == "idle":
        time.sleep(8)
        os._exit(0)
    with watch.step():
        time.sleep(2 if behaviour == "short step" else 60)
    os._exit(0)


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [("stuck", [1, 9, 1]), ("idle", [0, 9, 0]), ("short step", [0, 9, 0])],
    ids=["a step that waits for the dead ends", "outside a step nothing happens", "a step that ends well goes on"],
)
def test_when_rank_1_of_3_dies(tmp_path, behaviour, expected):
    assert exit_codes(3, tmp_path, behaviour) == expected


def test_of_eight_ranks_all_end_soon(tmp_path):
    """The word goes round: one grace period in all, not one for each rank between."""
    began = time.monotonic()
    assert exit_codes(8, tmp_path, "stuck") == [1, 9, 1, 1, 1, 1, 1, 1]
    assert (
        time.monotonic() - began < 45
    )  # starting eight processes on two cores included; one by one it would be 40 more


def exit_codes(size: int, folder: Path, behaviour: str) -> list[int]:
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, size, str(folder / "store"), behaviour)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(55)
    return [process.exitcode for process in ranks]
