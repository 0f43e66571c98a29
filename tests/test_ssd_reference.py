"""The SSD reference against loops written from the recurrence, in float64, and against itself."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ssm_tp.ops import ssd_reference as ops

H, P, G, N = 6, 3, 2, 4
PER_TOKEN = ("x", "dt", "B", "C")
LIMIT = (0.05, 1.5)  # cuts on both sides


def inputs(*shape: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g)

    tokens = {"x": normal(*shape, H, P), "dt": normal(*shape, H), "B": normal(*shape, G, N), "C": normal(*shape, G, N)}
    return tokens | {"A": -torch.exp(normal(H)), "D": normal(H), "dt_bias": normal(H)}


def arguments(v: dict[str, torch.Tensor], *tokens: slice | int | None) -> list:
    """Arguments of a scan, those per token indexed by `tokens`."""
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    return [*(v[name][tokens] if tokens and name in PER_TOKEN else v[name] for name in names), LIMIT]


def by_loops(v: dict[str, torch.Tensor], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    v = {name: value.double() for name, value in v.items()}
    y, h = torch.zeros_like(v["x"]), state.double().clone()
    for b in range(y.shape[0]):
        for t in range(y.shape[1]):
            for head in range(H):
                group = head // (H // G)
                step = torch.log1p(torch.exp(v["dt"][b, t, head] + v["dt_bias"][head])).clamp(*LIMIT)
                drive = torch.outer(v["x"][b, t, head], v["B"][b, t, group]) * step
                h[b, head] = torch.exp(step * v["A"][head]) * h[b, head] + drive
                y[b, t, head] = h[b, head] @ v["C"][b, t, group] + v["D"][head] * v["x"][b, t, head]
    return y, h


def test_it_is_the_recurrence():
    v, state = inputs(2, 150), torch.randn(2, H, P, N)  # over two chunk boundaries
    y, h = ops.ssd(*arguments(v), initial_state=state)
    expected_y, expected_h = by_loops(v, state)
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h.double(), expected_h, rtol=1e-4, atol=1e-5)


@given(length=st.integers(2, 150), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_prompt_split_anywhere_gives_the_states_of_the_whole(length, data):
    at, v = data.draw(st.integers(1, length - 1)), inputs(1, length, seed=length)
    whole_y, whole_h = ops.ssd(*arguments(v))
    head_y, head_h = ops.ssd(*arguments(v, slice(None), slice(0, at)))
    tail_y, tail_h = ops.ssd(*arguments(v, slice(None), slice(at, None)), initial_state=head_h)
    torch.testing.assert_close(torch.cat([head_y, tail_y], 1), whole_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tail_h, whole_h, rtol=1e-4, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 80), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_packed_sequences_do_not_mix(lengths, seed):
    total, v, g = sum(lengths), inputs(sum(lengths), seed=seed), torch.Generator().manual_seed(seed)
    slots = torch.randperm(len(lengths) + 2, generator=g)[: len(lengths)]
    before = torch.randn(len(lengths) + 2, H, P, N, generator=g)
    states, cu_seqlens = before.clone(), torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    y = ops.ssd_varlen(*arguments(v), states, slots, cu_seqlens)
    assert len(y) == total
    for i, slot in enumerate(slots):
        own = slice(cu_seqlens[i], cu_seqlens[i + 1])
        y_alone, state_alone = ops.ssd(*arguments(v, None, own), initial_state=before[slot][None])
        torch.testing.assert_close(y[own], y_alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(states[slot], state_alone[0], rtol=1e-4, atol=1e-5)
    untouched = [slot for slot in range(len(before)) if slot not in slots]
    assert torch.equal(states[untouched], before[untouched])


def test_steps_continue_a_prefill():
    v, slots, states = inputs(1, 70), torch.tensor([1]), torch.zeros(2, H, P, N)
    whole_y, whole_h = ops.ssd(*arguments(v))
    for t in range(70):
        y = ops.ssd_step(*arguments(v, slice(None), t), states, slots)
        torch.testing.assert_close(y, whole_y[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[1], whole_h[0], rtol=1e-4, atol=1e-5)


def test_gradients():
    v = {name: value.requires_grad_() for name, value in inputs(1, 5).items()}

    def layer(*args: torch.Tensor) -> torch.Tensor:
        y, h = ops.ssd(*arguments(dict(zip(v, args, strict=True))))
        return torch.cat([y.flatten(), h.flatten()]).double()

    assert torch.autograd.gradcheck(layer, tuple(v.values()), eps=1e-2, atol=3e-2, rtol=3e-2, nondet_tol=1e-6)
