"""What ranks are asked about the gated norm that spans them."""

from types import SimpleNamespace

import jobs
import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch.nn.functional import silu

from megatron_ssm_tp.config import GatedNormConfig
from megatron_ssm_tp.layers.gated_norm import GatedRMSNorm, NormCase


def gated_norm_error(
    groups: int, before_gate: bool, magnitude: float, exact: bool, dtype: torch.dtype = torch.float32
) -> float:
    """Largest difference, relative to the largest value, between norm, gate and product over ranks and written out."""
    group, d, h, g = jobs.groups().tp, 32, 6, torch.Generator().manual_seed(3)
    y, z = torch.randn(5, 2, d, generator=g) * magnitude, torch.randn(5, 2, d, generator=g)
    w, weight = torch.rand(d, generator=g) + 0.5, torch.randn(h, d, generator=g)
    y, z, w, weight = (t.to(dtype) for t in (y, z, w, weight))
    own = slice(group.rank() * d // group.size(), (group.rank() + 1) * d // group.size())
    norm = GatedRMSNorm(GatedNormConfig(1e-5, groups, before_gate), d, group, dtype, torch.device("cpu"), exact)
    norm.weight.data = w[own]
    with torch.no_grad():
        if norm.case is NormCase.DEFERRED:
            out_proj = SimpleNamespace(
                weight=weight[:, own],
                gradient_accumulation_fusion=False,
                gtp_remat_size=1,
                _forward_impl=lambda input, weight, **_: input @ weight.T,
            )
            packed = norm.packed_product(y[..., own], z[..., own], out_proj)
            found = norm.unpack(reduce_from_tensor_model_parallel_region(packed, group=group))
        else:
            found = reduce_from_tensor_model_parallel_region(
                norm(y[..., own], z[..., own]) @ weight[:, own].T, group=group
            )
    y, z = y.double(), z.double()
    value = (y if before_gate else y * silu(z)).unflatten(-1, (groups, -1))
    normed = (value / (value.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * w.double()
    expected = (normed * silu(z) if before_gate else normed) @ weight.double().T
    return float((found - expected).abs().max() / expected.abs().max())
