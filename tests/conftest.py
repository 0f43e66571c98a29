import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: the tests' ranks are gloo's, on the CPU, also where GPUs are

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from models import TinyModel, make_tiny
from ranks import Ranks

torch.set_num_threads(1)
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], Ranks]]:
    """world(n): n gloo ranks, started at the first call and shared by the whole session."""
    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in pools or not all(process.is_alive() for process in pools[size].processes):
            pools[size] = Ranks(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """tiny(family, **options): a small Hugging Face model on disk, made once for the same options."""
    made: dict[str, TinyModel] = {}

    def get(family: str, **options) -> TinyModel:
        key = repr((family, sorted(options.items())))
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return get


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., str]]:
    """interpreted(job, ...): the job's result in a process whose Triton interprets, from its first import on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()  # started, with this environment
    yield lambda job, *args: pool.submit(job, *args).result(timeout=120)
    pool.shutdown()
