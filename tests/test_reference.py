"""The reference operators against loops written from the recurrence, in float64, and against themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ssm_tp.ops import reference as ops

D, N, K = 7, 3, 4


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """x, dt, z, B, C for tokens of `shape`, and the parameters."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g).to(dtype)

    tokens = {name: normal(*shape, D) for name in ("x", "dt", "z")} | {name: normal(*shape, N) for name in "BC"}
    return tokens | {
        "A": -torch.exp(normal(D, N)),
        "D": normal(D),
        "dt_bias": normal(D),
        "weight": normal(D, K),
        "bias": normal(D),
    }


SCAN = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


PER_TOKEN = ("x", "dt", "z", "B", "C")


def scan_args(v: dict[str, torch.Tensor], *tokens: slice | int | None) -> list[torch.Tensor]:
    """Arguments of a scan, those per token indexed by `tokens`."""
    return [v[name][tokens] if tokens and name in PER_TOKEN else v[name] for name in SCAN]


def scan_by_loops(v: dict[str, torch.Tensor], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 2 of the paper, one number at a time, float64."""
    v = {name: value.double() for name, value in v.items()}
    batch, length, _ = v["x"].shape
    y, h = torch.zeros_like(v["x"]), state.double().clone()
    for b in range(batch):
        for t in range(length):
            for d in range(D):
                step = torch.log1p(torch.exp(v["dt"][b, t, d] + v["dt_bias"][d]))
                for n in range(N):
                    h[b, d, n] = torch.exp(step * v["A"][d, n]) * h[b, d, n] + step * v["B"][b, t, n] * v["x"][b, t, d]
                out = h[b, d] @ v["C"][b, t] + v["D"][d] * v["x"][b, t, d]
                y[b, t, d] = out * v["z"][b, t, d] * torch.sigmoid(v["z"][b, t, d])
    return y, h


def conv_by_loops(v: dict[str, torch.Tensor], history: torch.Tensor) -> torch.Tensor:
    full = torch.cat([history.transpose(1, 2), v["x"]], dim=1).double()
    y = torch.zeros_like(v["x"], dtype=torch.double)
    for t in range(y.shape[1]):
        window = full[:, t + 1 : t + 1 + K]
        y[:, t] = (window * v["weight"].double().T).sum(1) + v["bias"].double()
    return y * torch.sigmoid(y)


def test_scan_is_the_recurrence():
    v, state = inputs(2, 5), torch.randn(2, D, N)
    y, h = ops.selective_scan(*scan_args(v), initial_state=state)
    expected_y, expected_h = scan_by_loops(v, state)
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.double(), expected_h, rtol=1e-5, atol=1e-5)


def test_conv_is_the_sum_of_taps():
    v, history = inputs(2, 6), torch.randn(2, D, K)
    y, state = ops.causal_conv1d(v["x"], v["weight"], v["bias"], history)
    torch.testing.assert_close(y.double(), conv_by_loops(v, history), rtol=1e-5, atol=1e-5)
    assert torch.equal(state, v["x"][:, -K:].transpose(1, 2))


@given(length=st.integers(2, 150), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_prompt_split_anywhere_gives_the_states_of_the_whole(length, data):
    at = data.draw(st.integers(1, length - 1))
    v = inputs(1, length, seed=length)
    whole_y, whole_h = ops.selective_scan(*scan_args(v))
    head_y, head_h = ops.selective_scan(*scan_args(v, slice(None), slice(0, at)))
    tail_y, tail_h = ops.selective_scan(*scan_args(v, slice(None), slice(at, None)), initial_state=head_h)
    torch.testing.assert_close(torch.cat([head_y, tail_y], 1), whole_y)
    torch.testing.assert_close(tail_h, whole_h)
    conv = (v["weight"], v["bias"])
    whole_c, whole_s = ops.causal_conv1d(v["x"], *conv)
    head_c, head_s = ops.causal_conv1d(v["x"][:, :at], *conv)
    tail_c, tail_s = ops.causal_conv1d(v["x"][:, at:], *conv, head_s)
    torch.testing.assert_close(torch.cat([head_c, tail_c], 1), whole_c)
    assert torch.equal(tail_s, whole_s)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_packed_sequences_do_not_mix(lengths, seed):
    """Packed with states in scattered slots = each sequence alone; untouched slots keep every bit."""
    total, slots_total = sum(lengths), len(lengths) + 2
    v = inputs(total, seed=seed)
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(slots_total, generator=g)[: len(lengths)]
    conv0, ssm0 = torch.randn(slots_total, D, K, generator=g), torch.randn(slots_total, D, N, generator=g)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    conv, ssm = conv0.clone(), ssm0.clone()
    x = ops.causal_conv1d_varlen(v["x"], v["weight"], v["bias"], conv, slots, cu_seqlens)
    y = ops.selective_scan_varlen(*scan_args(v), ssm, slots, cu_seqlens)
    for i, slot in enumerate(slots):
        own = slice(cu_seqlens[i], cu_seqlens[i + 1])
        x_alone, conv_alone = ops.causal_conv1d(v["x"][None, own], v["weight"], v["bias"], conv0[slot][None])
        y_alone, ssm_alone = ops.selective_scan(*scan_args(v, None, own), ssm0[slot][None])
        torch.testing.assert_close(x[own], x_alone[0])
        torch.testing.assert_close(y[own], y_alone[0])
        torch.testing.assert_close(conv[slot], conv_alone[0])
        torch.testing.assert_close(ssm[slot], ssm_alone[0])
    untouched = [slot for slot in range(slots_total) if slot not in slots]
    assert torch.equal(conv[untouched], conv0[untouched]) and torch.equal(ssm[untouched], ssm0[untouched])


def test_steps_continue_a_prefill():
    length, slots = 30, torch.tensor([2])
    v = inputs(1, length)
    whole_y, whole_h = ops.selective_scan(*scan_args(v))
    whole_x, whole_s = ops.causal_conv1d(v["x"], v["weight"], v["bias"])
    conv, ssm = torch.zeros(3, D, K), torch.zeros(3, D, N)
    for t in range(length):
        x = ops.causal_conv1d_step(v["x"][:, t], v["weight"], v["bias"], conv, slots)
        y = ops.selective_state_step(*scan_args(v, slice(None), t), ssm, slots)
        torch.testing.assert_close(x, whole_x[:, t])
        torch.testing.assert_close(y, whole_y[:, t])
    torch.testing.assert_close(ssm[2], whole_h[0])
    torch.testing.assert_close(conv[2], whole_s[0])


def test_gradients_of_scan_and_conv():
    v = {name: value.double().requires_grad_() for name, value in inputs(1, 4, dtype=torch.double).items()}
    state = torch.randn(1, D, N, dtype=torch.double)

    def layer(*args: torch.Tensor) -> torch.Tensor:
        named = dict(zip(v, args, strict=True))
        x, _ = ops.causal_conv1d(named["x"], named["weight"], named["bias"])
        y, h = ops.selective_scan(*(x if name == "x" else named[name] for name in SCAN), initial_state=state)
        return torch.cat([y.flatten(), h.flatten()])

    # The operators compute in float32 by contract, so finite differences are coarse.
    assert torch.autograd.gradcheck(layer, tuple(v.values()), eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_summed_in_float32(dtype):
    v = inputs(1, 100, dtype=dtype)
    y, h = ops.selective_scan(*scan_args(v))
    expected_y, expected_h = scan_by_loops(v, torch.zeros(1, D, N))
    assert y.dtype == dtype and h.dtype == torch.float32
    torch.testing.assert_close(h.double(), expected_h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.double(), expected_y, rtol=torch.finfo(dtype).eps, atol=1e-3)
