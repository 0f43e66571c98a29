"""Initial values of mixers for training from scratch (mamba_ssm Mamba and Mamba2; HF init_mamba_weights)."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from ..config import Mamba1Config, Mamba2Config
from ..partition.apply import cut
from ..partition.parameters import Parameter
from .sharding import sum_over_holders

Fill = Callable[[torch.Tensor], object]  # fills a tensor in place
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


def filled_later(tensor: torch.Tensor) -> torch.Tensor:
    """An init_method that draws nothing, for weights that the functions below fill.

    in_proj's class would cut its initial values contiguously, not by band, and draw more of them where groups are
    shared: each number of ranks would have another model.
    """
    return tensor


def _conv_uniform(tensor: torch.Tensor, width: int) -> None:
    bound = 1 / math.sqrt(width)
    tensor.uniform_(-bound, bound)


def _inverse_softplus_of_dt(bias: torch.Tensor) -> None:
    """So that softplus(bias) is log-uniform in [DT_MIN, DT_MAX]."""
    spread = math.log(DT_MAX) - math.log(DT_MIN)
    dt = torch.exp(torch.rand(bias.shape, device=bias.device) * spread + math.log(DT_MIN)).clamp(min=DT_FLOOR)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def initialize_mamba1(
    parameters: Mapping[str, torch.Tensor],
    table: Mapping[str, Parameter],
    dims: Mamba1Config,
    config: TransformerConfig,
    tp_group: dist.ProcessGroup,
) -> None:
    """Fill one rank's conv1d, x_proj, dt_proj, A_log, D and in_proj; out_proj was filled by its own class."""
    dt_bound = dims.dt_rank**-0.5
    own: dict[str, Fill] = {
        "x_proj.weight": config.init_method,
        "dt_proj.weight": lambda t: t.uniform_(-dt_bound, dt_bound),
        "dt_proj.bias": _inverse_softplus_of_dt,
    }
    draw_all(_common_fills(dims, config) | own, parameters, table, config, tp_group)
    A_log, D = parameters["A_log"], parameters["D"]
    states = torch.arange(1, dims.d_state + 1, dtype=torch.float32, device=A_log.device)
    A_log.copy_(torch.log(states).expand_as(A_log))
    D.fill_(1.0)


@torch.no_grad()
def initialize_mamba2(
    parameters: Mapping[str, torch.Tensor],
    table: Mapping[str, Parameter],
    dims: Mamba2Config,
    config: TransformerConfig,
    tp_group: dist.ProcessGroup,
) -> None:
    """Fill one rank's conv1d, dt_bias, A_log, D and in_proj; out_proj and the norm were filled by their own classes."""
    own: dict[str, Fill] = {"dt_bias": _inverse_softplus_of_dt, "A_log": lambda t: t.uniform_(1, 16).log_()}
    draw_all(_common_fills(dims, config) | own, parameters, table, config, tp_group)
    parameters["D"].fill_(1.0)


def _common_fills(dims: Mamba1Config | Mamba2Config, config: TransformerConfig) -> dict[str, Fill]:
    """What the random parameters that every mixer has are filled with."""
    return {
        "in_proj.weight": config.init_method,
        "conv1d_weight": lambda t: _conv_uniform(t, dims.d_conv),
        "conv1d_bias": lambda t: _conv_uniform(t, dims.d_conv),
    }


@torch.no_grad()
def draw_all(
    fills: Mapping[str, Fill],
    parameters: Mapping[str, torch.Tensor],
    table: Mapping[str, Parameter],
    config: TransformerConfig,
    tp_group: dist.ProcessGroup,
) -> None:
    """Fill those parameters of one rank that `fills` names, as far as the table has them."""
    for name, fill in fills.items():
        if name in table:  # a convolution may have no bias
            _draw(parameters[name], fill, table[name], config, tp_group)


def _draw(
    target: torch.Tensor,
    fill: Fill,
    parameter: Parameter,
    config: TransformerConfig,
    tp_group: dist.ProcessGroup,
) -> None:
    """Fill one random parameter as Megatron fills its linears: whole and then cut on the CPU, so that it does not
    depend on the TP size, or by rank from the model-parallel generator on the GPU."""
    if config.use_cpu_initialization:
        whole = torch.empty(parameter.shape)
        fill(whole)
        target.copy_(cut(whole, parameter.axis, parameter.plan(tp_group.size()), tp_group.rank()))
        return
    with get_cuda_rng_tracker().fork():
        fill(target)
    tp, rank, bands = tp_group.size(), tp_group.rank(), parameter.packing.bands
    pieces = target.split([band.local_size(tp) for band in bands], dim=parameter.axis)
    for band, piece in zip(bands, pieces, strict=True):
        if band.is_shared(tp):  # the ranks drew different values: the first holder's count
            first = rank % (tp // band.atoms) == 0
            piece.copy_(sum_over_holders(piece if first else torch.zeros_like(piece), band, tp_group))
