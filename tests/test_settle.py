"""A step's bookkeeping as a kernel, in Triton's interpreter."""

import pytest
import settle_jobs as jobs
from hopper import compile_for_hopper
from models import COMMON, MAMBA

from megatron_ssm_tp.checkpoint.families import find_family

pytest.importorskip("triton")


@pytest.mark.parametrize("seed", range(5))
def test_steps_are_noted_as_torch_notes_them(interpreted, seed):
    config = find_family({"model_type": "mamba", **COMMON, **MAMBA}).config({"model_type": "mamba", **COMMON, **MAMBA})
    assert interpreted(jobs.steps, config, seed) == ""


def test_the_kernel_compiles_for_gpus_that_are_not_here():
    from megatron_ssm_tp.inference.settle_triton import settle_rows

    types = {f"{name}_ptr": "*i64" for name in ("tokens", "slots", "emitted", "end_ids", "limits", "counts")}
    types |= {"next_token_ptr": "*i64", "alive_ptr": "*i1", "rows": "i32", "nowhere": "i32"}
    constants = {"END_IDS": 8, "ROWS": 128, "OVERLAPS": True}
    assert ".target sm_90" in compile_for_hopper(settle_rows, types, constants, 4).asm["ptx"]
