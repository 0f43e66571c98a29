"""Partition arithmetic by its properties: any bands, any legal numbers of ranks, a distinct value in every element."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.partition.apply import cut, merge, recut
from megatron_ssm_tp.partition.bands import Band, Packing, Uneven
from megatron_ssm_tp.partition.plan import Plan, check_tp, legal_tp, moves

RANKS = range(1, 13)


@st.composite
def bands(draw: st.DrawFn, index: int) -> Band:
    atom, units = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    uneven = draw(st.sampled_from(Uneven))
    if uneven is Uneven.REFUSE and draw(st.booleans()):
        return Band(f"band{index}", atom * units, sections=units)
    return Band(f"band{index}", atom * units, units if draw(st.booleans()) else None, uneven)


@st.composite
def packings(draw: st.DrawFn) -> Packing:
    if draw(st.booleans()):
        band = draw(bands(0))
        count = draw(st.integers(1, 3))
        return Packing(tuple(replace(band, name=f"b{i}") for i in range(count)), interleaved=True)
    return Packing(tuple(draw(bands(index)) for index in range(draw(st.integers(1, 4)))))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Packing, int, int, torch.Tensor, int]:
    """A packing, two legal numbers of ranks, a tensor of distinct values packed along an axis, and that axis."""
    packing = draw(packings())
    legal = [tp for tp in RANKS if packing.allows(tp)]
    shape = draw(st.lists(st.integers(1, 3), max_size=2))
    axis = draw(st.integers(0, len(shape)))
    shape.insert(axis, packing.size)
    values = torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)
    return packing, draw(st.sampled_from(legal)), draw(st.sampled_from(legal)), values, axis


def shards_of(values: torch.Tensor, axis: int, plan: Plan) -> list[torch.Tensor]:
    return [cut(values, axis, plan, rank) for rank in range(plan.tp)]


@given(cuts())
@settings(max_examples=300, deadline=None)
def test_merge_undoes_cut(case):
    packing, tp, _, values, axis = case
    plan = Plan(packing, tp)
    assert torch.equal(merge(shards_of(values, axis, plan), axis, plan), values)


@given(cuts())
@settings(max_examples=300, deadline=None)
def test_recut_equals_cutting_anew(case):
    packing, old, new, values, axis = case
    old_plan, new_plan = Plan(packing, old), Plan(packing, new)
    moved = recut(shards_of(values, axis, old_plan), axis, old_plan, new_plan)
    for found, expected in zip(moved, shards_of(values, axis, new_plan), strict=True):
        assert torch.equal(found, expected)


@given(cuts())
@settings(max_examples=300, deadline=None)
def test_every_element_lands_exactly_once(case):
    packing, tp, _, values, axis = case
    shards = shards_of(values, axis, Plan(packing, tp))
    landed = torch.cat([shard.flatten() for shard in shards])
    landed, counts = landed[landed > 0].unique(return_counts=True)  # zero is padding
    assert torch.equal(landed, values.flatten().sort().values)
    copies = {1} | {tp // band.atoms for band in packing.bands if band.uneven is Uneven.REPLICATE and band.atoms < tp}
    assert set(counts.tolist()) <= copies


@given(cuts())
@settings(max_examples=200, deadline=None)
def test_moves_write_each_new_element_once(case):
    packing, old, new, _, _ = case
    old_plan, new_plan = Plan(packing, old), Plan(packing, new)
    for rank in range(new):
        written = torch.zeros(new_plan.local_size, dtype=torch.int)
        for move in moves(old_plan, new_plan):
            if move.target == rank:
                written[move.target_slice] += 1
        held = torch.zeros(new_plan.local_size, dtype=torch.int)
        for piece in new_plan.pieces(rank):
            held[piece.local_slice] += 1
        assert torch.equal(written, held)


def test_packed_bands_are_cut_one_by_one():
    """The mistake this exists to prevent: rank 0 with all of x and none of z."""
    plan = Plan(Packing((Band("x", 4), Band("z", 4))), 2)
    assert cut(torch.arange(8), 0, plan, 0).tolist() == [0, 1, 4, 5]
    assert cut(torch.arange(8), 0, plan, 1).tolist() == [2, 3, 6, 7]


def test_interleaved_rows_become_contiguous_bands():
    plan = Plan(Packing((Band("x", 4), Band("z", 4)), interleaved=True), 2)  # x0 z0 x1 z1 ...
    assert cut(torch.arange(8), 0, plan, 0).tolist() == [0, 2, 1, 3]
    assert cut(torch.arange(8), 0, plan, 1).tolist() == [4, 6, 5, 7]


def test_one_group_is_copied_to_every_rank():
    plan = Plan(Packing((Band("x", 4), Band("B", 2, units=1, uneven=Uneven.REPLICATE))), 2)
    assert cut(torch.arange(6), 0, plan, 0).tolist() == [0, 1, 4, 5]
    assert cut(torch.arange(6), 0, plan, 1).tolist() == [2, 3, 4, 5]


def test_groups_go_to_the_ranks_whose_heads_use_them():
    plan = Plan(Packing((Band("B", 6, units=2, uneven=Uneven.REPLICATE),)), 4)
    assert [cut(torch.arange(6), 0, plan, rank).tolist() for rank in range(4)] == [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2


def test_heads_are_never_split():
    with pytest.raises(
        UserError, match=r"tensor_model_parallel_size=4: does not divide heads \(2\); legal: 1, 2 \(to 64\)$"
    ):
        check_tp([Packing((Band("heads", 8, units=2),))], 4)


def test_padding_is_zero_and_last():
    plan = Plan(Packing((Band("vocab", 5, uneven=Uneven.PAD),)), 4)
    values = torch.arange(1, 6)
    assert [cut(values, 0, plan, rank).tolist() for rank in range(4)] == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_legal_sizes_satisfy_every_packing():
    heads, groups = Packing((Band("heads", 12),)), Packing((Band("B", 8, units=2, uneven=Uneven.REPLICATE),))
    assert legal_tp([heads, groups], limit=12) == [1, 2, 4, 6, 12]


@pytest.mark.parametrize("tp", [0, -2])
def test_a_tp_size_is_positive(tp):
    with pytest.raises(UserError, match=f"tensor_model_parallel_size={tp}: is not a positive number; legal: 1, 2, 4"):
        check_tp([Packing((Band("x", 4),))], tp)


def test_plans_of_different_packings_do_not_mix():
    with pytest.raises(ValueError, match="different packings"):
        list(moves(Plan(Packing((Band("x", 4),)), 2), Plan(Packing((Band("x", 8),)), 2)))


@pytest.mark.parametrize("bad", [{"size": 0}, {"size": 6, "units": 4}], ids=["empty", "ragged"])
def test_malformed_bands_are_refused(bad):
    with pytest.raises(ValueError, match="is not made of"):
        Band("x", **bad)


def test_the_plan_modules_need_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, megatron_ssm_tp.partition.explain, megatron_ssm_tp.checkpoint.families; "
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 3, 6])
def test_sections_are_whole_on_a_rank_or_in_one_piece(tp):
    """Zamba's two heads of 12 channels: no rank may hold parts of both unless it holds both."""
    band = Band("d_inner", 24, sections=2)
    if not band.allows(tp):
        assert tp == 3
        return
    for rank in range(tp):
        start, stop = band.range_of(rank, tp)
        assert (start // 12 == (stop - 1) // 12) or (start, stop) == (0, 24)


def test_a_size_that_would_halve_sections_is_refused():
    with pytest.raises(
        UserError, match=r"=3: neither divides the 2 sections of d_inner nor is a multiple of them; legal"
    ):
        check_tp([Packing((Band("x", 24, dimension="d_inner", sections=2),))], 3)
