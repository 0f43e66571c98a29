"""RMS norms that need neither Transformer Engine nor Apex."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ..ops.norm import rms_norm


class LocalRMSNorm(nn.Module):
    """RMSNorm over [..., hidden_size] with a weight that every rank holds whole (HF MambaRMSNorm).

    Unlike Megatron's WrappedTorchNorm it runs under sequence parallelism: the weight is marked so that
    finalize_model_grads sums its gradient over the tensor-parallel group. The result has the weight's dtype, which
    also ends a float32 residual stream before the output layer.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
