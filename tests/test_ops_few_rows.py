"""Products of few rows, and Mamba-1's step from x_proj on, in Triton's interpreter against torch and the references."""

import few_rows_jobs as jobs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ssm_tp.ops import dt_step
from megatron_ssm_tp.ops.few_rows import FewRowsLaunch, few_rows_linear

pytest.importorskip("triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.integers(1, 4),
    rows=st.sampled_from([1, 9, 37]),
    columns=st.sampled_from([16, 100, 1024, 1500, 4100]),
    dtype=st.sampled_from(DTYPES),
    gap=st.sampled_from([0, 8, 3]),
    launch=st.sampled_from([None, FewRowsLaunch(4, 256, 1, 4), FewRowsLaunch(16, 128, 2, 3, dot=True)]),
)
def test_products_are_torchs(interpreted, requests, rows, columns, dtype, gap, launch):
    assert interpreted(jobs.product, requests, rows, columns, dtype, gap, launch) == ""


@settings(max_examples=20, deadline=None)
@given(
    requests=st.sampled_from([1, 3, 8]),
    channels=st.sampled_from([1, 33, 64]),
    dt_rank=st.sampled_from([1, 7, 20]),
    d_state=st.sampled_from([5, 16]),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([None, 1e-5]),
)
def test_the_step_is_the_three_apart(interpreted, requests, channels, dt_rank, d_state, dtype, eps):
    assert interpreted(jobs.step, requests, channels, dt_rank, d_state, dtype, eps) == ""


def test_the_cpu_and_autograd_are_torchs():
    x, weight = torch.randn(2, 1, 5), torch.randn(3, 5, requires_grad=True)
    torch.testing.assert_close(few_rows_linear(x, weight), x @ weight.T)
    assert few_rows_linear(x, weight).requires_grad
    assert dt_step.fits(8, 256) and not dt_step.fits(9, 256) and not dt_step.fits(1, 2000) and not dt_step.fits(0, 8)
