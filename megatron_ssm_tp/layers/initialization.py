"""Initial values of a Mamba-1 mixer for training from scratch (mamba_ssm Mamba.__init__; HF init_mamba_weights)."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from ..partition.apply import cut

if TYPE_CHECKING:
    from .mamba1_mixer import Mamba1Mixer

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


def _conv_uniform(tensor: torch.Tensor, width: int) -> None:
    bound = 1 / math.sqrt(width)
    tensor.uniform_(-bound, bound)


def _inverse_softplus_of_dt(bias: torch.Tensor) -> None:
    """So that softplus(bias) is log-uniform in [DT_MIN, DT_MAX]."""
    spread = math.log(DT_MAX) - math.log(DT_MIN)
    dt = torch.exp(torch.rand(bias.shape, device=bias.device) * spread + math.log(DT_MIN)).clamp(min=DT_FLOOR)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def initialize_mamba1(mixer: "Mamba1Mixer") -> None:
    """Fill conv1d, dt_proj, A_log, D and in_proj; x_proj and out_proj were filled by their own classes.

    in_proj's class cut its initial values contiguously, not by band: each rank count had another model.
    """
    dims = mixer.dims
    dt_bound = dims.dt_rank**-0.5
    _draw(mixer, "in_proj.weight", mixer.config.init_method)
    _draw(mixer, "conv1d_weight", lambda t: _conv_uniform(t, dims.d_conv))
    if dims.conv_bias:
        _draw(mixer, "conv1d_bias", lambda t: _conv_uniform(t, dims.d_conv))
    _draw(mixer, "dt_proj.weight", lambda t: t.uniform_(-dt_bound, dt_bound))
    _draw(mixer, "dt_proj.bias", _inverse_softplus_of_dt)
    states = torch.arange(1, dims.d_state + 1, dtype=torch.float32, device=mixer.A_log.device)
    mixer.A_log.copy_(torch.log(states).expand_as(mixer.A_log))
    mixer.D.fill_(1.0)


def _draw(mixer: "Mamba1Mixer", name: str, fill: Callable[[torch.Tensor], object]) -> None:
    """Fill one random parameter as Megatron fills its linears: whole and then cut on the CPU, so that it does not
    depend on the TP size, or by rank from the model-parallel generator on the GPU."""
    target, parameter = mixer.get_parameter(name), mixer.table[name]
    if mixer.config.use_cpu_initialization:
        whole = torch.empty(parameter.shape)
        fill(whole)
        target.copy_(cut(whole, parameter.axis, parameter.plan(mixer.tp_group.size()), mixer.tp_group.rank()))
        return
    with get_cuda_rng_tracker().fork():
        fill(target)
