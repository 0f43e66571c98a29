"""Attention over pages against attention written out, whatever the lengths, the pages and the memory at hand."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ssm_tp.config import RotaryConfig
from megatron_ssm_tp.layers.rotary import rotate
from megatron_ssm_tp.ops import attention as ops

PAGE = 4


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One request: q [l, H, d], the last queries of keys k, v [L, Hkv, d], in float64."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    y = torch.empty_like(q, dtype=torch.float64)
    for row in range(len(q)):
        seen = len(k) - len(q) + row + 1
        weights = torch.einsum("hd,mhd->hm", q[row].double(), k[:seen]).mul(scale).softmax(-1)
        y[row] = torch.einsum("hm,mhd->hd", weights, v[:seen])
    return y


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=5),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([1, 100, 1 << 27]),
)
@settings(max_examples=60, deadline=None)
def test_pages_hold_what_was_put_there(requests, heads, scores):
    """Requests of some new tokens after some old ones, pages in any order, the rest of memory not a number."""
    generator = torch.Generator().manual_seed(len(requests))
    (H, K), d = heads, 5
    lengths = [new + old for new, old in requests]
    most = -(-max(lengths) // PAGE)
    order = torch.randperm(most * len(requests), generator=generator)
    table = order.view(len(requests), most).int()
    pages = torch.full((2, len(order) + 3, PAGE, K, d), float("nan"))
    qs, expected = [], []
    for (new, _), length, row in zip(requests, lengths, table, strict=True):
        q, k, v = (torch.randn(n, h, d, generator=generator) for n, h in ((new, H), (length, K), (length, K)))
        for at in range(length):
            pages[0, row[at // PAGE], at % PAGE], pages[1, row[at // PAGE], at % PAGE] = k[at], v[at]
        qs.append(q)
        expected.append(written_out(q, k, v, 0.3))
    cu_seqlens = torch.tensor([0, *torch.tensor([new for new, _ in requests]).cumsum(0)], dtype=torch.int32)
    longest = max(new for new, _ in requests), max(lengths)
    with mock.patch.object(ops, "SCORES", scores):  # down to one query at a time
        arguments = (torch.cat(qs), *pages, table, cu_seqlens, torch.tensor(lengths, dtype=torch.int32), longest, 0.3)
        y = ops.paged_attention(*arguments)
    torch.testing.assert_close(y.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 7])
def test_dense_attention_sees_no_later_key(offset):
    q, k, v = torch.randn(1, 5, 4, 6), torch.randn(1, 5 + offset, 2, 6), torch.randn(1, 5 + offset, 2, 6)
    y = ops.attention(q, k, v, 0.4, offset)
    torch.testing.assert_close(y[0].double(), written_out(q[0], k[0], v[0], 0.4), rtol=1e-5, atol=1e-5)


def test_which_implementation_is_taken():
    def queries(**changes) -> SimpleNamespace:
        return SimpleNamespace(**({"dtype": torch.bfloat16, "is_cuda": True, "shape": (7, 4, 64)} | changes))

    with mock.patch.object(ops, "_installed", lambda name: name == "torch.nn.attention.varlen"):
        assert ops.implementation(queries(), 256) == "torch varlen"
        for other in ({"dtype": torch.float32}, {"is_cuda": False}, {"shape": (7, 4, 464)}, {"shape": (7, 4, 44)}):
            assert ops.implementation(queries(**other), 256) == "softmax"
    with mock.patch.object(ops, "_installed", lambda name: True):
        assert ops.implementation(queries(), 256) == "flash-attn"
        assert ops.implementation(queries(), 64) == "torch varlen"
    with mock.patch.object(ops, "_installed", lambda name: False):
        assert ops.implementation(queries(), 256) == "softmax"


def test_rotation_is_by_position_and_leaves_the_rest():
    """Scores depend on the distance alone; channels beyond `dim` and position 0 are left as they are."""
    rotary, x = RotaryConfig(theta=100.0, dim=4, factor=2.0), torch.randn(2, 3, 7)
    at = {position: rotate(x, torch.tensor([position, position + 6]), rotary) for position in (0, 10)}
    scores = [torch.einsum("hd,hd->h", turned[0], turned[1]) for turned in at.values()]
    torch.testing.assert_close(*scores)
    assert torch.equal(at[10][..., 4:], x[..., 4:]) and torch.equal(at[0][0], x[0])
    angle = torch.tensor(6 / 2 / 100.0**0.5)
    expected = x[1, :, 1] * angle.cos() - x[1, :, 3] * angle.sin()
    torch.testing.assert_close(at[0][1, :, 1], expected)
