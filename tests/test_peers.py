"""The watch that NCCL needs to notice a dead peer; here over gloo, where a sleep plays the waiting kernel."""

import multiprocessing as mp
import os
import time

import pytest


def _rank(rank: int, store: str, behaviour: str) -> None:
    import torch.distributed as dist

    from megatron_ssm_tp.inference.peers import PeerWatch

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
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
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), behaviour)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(45)
    assert [process.exitcode for process in ranks] == expected
