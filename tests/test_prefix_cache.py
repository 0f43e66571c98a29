"""Kept prefixes: the right one is found, the least used go, and answers are those without."""

import engine_jobs as jobs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ssm_tp import CacheLimits, UserError
from megatron_ssm_tp.inference import prefix_cache
from megatron_ssm_tp.inference.prefix_cache import GRANULE, PrefixCache, Snapshot

TOKENS = st.lists(st.integers(0, 1), max_size=6)


def snapshot_of(number: int) -> Snapshot:
    return Snapshot(torch.full((2,), float(number)), torch.zeros(3))


@given(st.lists(TOKENS.filter(bool), max_size=8, unique_by=tuple), TOKENS.filter(bool))
def test_the_longest_kept_prefix_that_leaves_a_token_is_found(prefixes, prompt):
    cache = PrefixCache(1 << 20)
    for number, prefix in enumerate(prefixes):
        cache.keep(prefix, snapshot_of(number))
    fitting = [prefix for prefix in prefixes if len(prefix) < len(prompt) and prompt[: len(prefix)] == prefix]
    length, states = cache.find(prompt)
    if fitting:
        best = max(fitting, key=len)
        assert length == len(best) and states.conv[0] == prefixes.index(best)
        assert (cache.counts.hits, cache.counts.misses, cache.counts.tokens) == (1, 0, length)
    else:
        assert (length, states) == (0, None) and (cache.counts.hits, cache.counts.misses) == (0, 1)


def test_the_least_recently_used_go():
    each = snapshot_of(0).nbytes
    cache = PrefixCache(2 * each + 1)
    for number in range(2):
        cache.keep([number], snapshot_of(number))
    assert cache.find([0, 9])[0] == 1
    cache.keep([2], snapshot_of(2))
    assert [cache.find([number, 9])[0] for number in range(3)] == [1, 0, 1]
    cache.keep([2], snapshot_of(7))
    assert len(cache) == 2 and cache.nbytes == 2 * each and cache.find([2, 9])[1].conv[0] == 7
    small = PrefixCache(each - 1)
    small.keep([1], snapshot_of(1))
    assert len(small) == 0 and small.nbytes == 0


def test_states_of_other_sums_are_other_states():
    cache, prompt = PrefixCache(1 << 20), [1] * (2 * GRANULE)
    for number, made_by in enumerate(("a", "b")):
        cache.keep(prompt, snapshot_of(number), made_by)
    assert [cache.find([*prompt, 1], made_by)[0] for made_by in ("a", "b", "c", "")] == [len(prompt)] * 2 + [0, 0]
    assert [cache.find([*prompt, 1], made_by)[1].conv[0] for made_by in ("a", "b")] == [0, 1]
    partings = [cache.parting(prompt, 0, made_by) for made_by in ("a", "b", "a")]
    assert partings == [0, 0, GRANULE]


def test_prompts_part_where_they_differ(monkeypatch):
    cache, common = PrefixCache(1), list(range(3 * GRANULE))
    assert cache.parting([*common, 1, 2], 0) == 0
    assert cache.parting(common + [5] * 200, 0) == 3 * GRANULE
    assert cache.parting([*common, 6], 3 * GRANULE) == 0
    assert cache.parting([*common[: 2 * GRANULE], 7], 0) == 2 * GRANULE
    assert cache.parting(common[: 2 * GRANULE], 0) == GRANULE  # a token is left to read
    monkeypatch.setattr(prefix_cache, "MOST_SEEN", 2)
    cache.parting([9] * (4 * GRANULE), 0)
    assert cache.parting(common, 0) == 0


@pytest.mark.parametrize("tp", [1, 2], ids=lambda tp: f"TP{tp}")
@pytest.mark.parametrize("family", ["falcon_mamba", "mamba2"])
def test_answers_are_those_without(world, tiny, family, tp):
    model, generator = tiny(family, tied=False), torch.Generator().manual_seed(4)
    system = torch.randint(0, 101, (150,), generator=generator).tolist()
    rounds = [[[*system, first]] for first in (1, 2, 3)] + [[[*system, 4, 4], [5], [*system[:70], 6]]]
    expected = [[model.greedy(prompt, 6) for prompt in prompts] for prompts in rounds]
    for found, counts, bytes_kept, kept in world(tp).run(jobs.with_prefixes, model.path, rounds, None, 2):
        assert found == expected
        # The second prompt shows what is shared, and its states are kept; the third begins there.
        assert counts == [(0, 0), (0, 0), (1, 128), (2, 256)] and bytes_kept == kept == 2
    for found, counts, *_ in world(tp).run(jobs.with_prefixes, model.path, rounds[:1], system, 1):
        assert found == expected[:1] and counts == [(1, 150)]


def test_a_prefix_read_under_one_recipe_is_none_under_another(world, tiny):
    for (plain, after, quantized), hits in world(2).run(jobs.prefixes_by_recipe, tiny("mamba").path, [7, 8] * 40):
        assert after == plain != quantized and hits == [0, 0, 1]


def test_errors(world, tiny):
    with pytest.raises(UserError, match="prefix_bytes=-1: is out of range"):
        CacheLimits(prefix_bytes=-1)
    assert world(1).run(jobs.no_prefixes, tiny("mamba").path, "slots") == [
        "prefix_bytes=0: keeps no prefixes; legal: CacheLimits(prefix_bytes=...) with a model of SSM layers alone"
    ]
    [message] = world(1).run(jobs.error_of_prefixes, tiny("zamba2").path)
    assert message == "prefix_bytes=1000: Megatron's engine keeps no prefixes; legal: 0"
