"""Sizes of passes that are CUDA graphs."""

import engine_jobs as jobs
import pytest
import torch
from torch import nn

from megatron_ssm_tp.inference.pass_sizes import LONG, SHORT, PassSizes

LENGTHS = (1, 16, 17, 1000, 1024, 1025, 1280, 2000, 4097, 8192)


@pytest.mark.parametrize("prompts", [1, 3, 4])
def test_every_pass_gets_the_least_size_that_holds_it(prompts):
    sizes = PassSizes(8192)
    for tokens in LENGTHS:
        most, room = sizes.holding(tokens, prompts)
        assert most == min(size for size in SHORT + LONG if size >= tokens) and room == (1 if prompts == 1 else 4)
        if tokens > 1024:
            assert most <= 1.25 * tokens
    assert sizes.holding(8193, prompts) is None


def test_many_prompts_are_padded_in_short_passes_alone():
    sizes = PassSizes(8192)
    assert sizes.holding(1000, 16) == (1024, 16) and sizes.holding(1000, 5) == (1024, 16)
    assert sizes.holding(1025, 5) is None and sizes.holding(16, 17) is None


@pytest.mark.parametrize("tokens", LENGTHS)
def test_passes_of_so_many_tokens_need_no_others(tokens):
    sizes = PassSizes(8192)
    needed = {sizes.holding(count, prompts) for count in range(1, tokens + 1) for prompts in (1, 4)} - {None}
    assert needed == {size for size in sizes.up_to(tokens) if size[1] < 16}


@pytest.mark.parametrize(("tp", "longest"), [(1, 2048), (2, 4096), (8, 8192)])
def test_graphs_end_where_the_device_takes_longer_than_the_host(tp, longest):
    """Falcon-Mamba-7B: 105 M parameters a layer."""
    with torch.device("meta"):
        layers = nn.ModuleList(nn.Linear(4096, 25600 // tp, bias=False) for _ in range(64))
    sizes = PassSizes.of(layers)
    assert max(tokens for tokens, _ in sizes.all) == longest
    assert PassSizes.of(nn.ModuleList()).all == PassSizes(1024).all


@pytest.mark.parametrize("way", ["halves", "x_proj"])
def test_passes_that_hide_reductions_have_no_size(world, tiny, way):
    """Padding counts: it would be hidden behind, too."""
    path = tiny("mamba").path
    assert world(2).run(jobs.sizes_of_passes, path, way, 20, [16, 17, 20]) == [[(16, 1), None, None]] * 2
    assert world(2).run(jobs.sizes_of_passes, path, way, None, [16, 17]) == [[(16, 1), (32, 1)]] * 2
