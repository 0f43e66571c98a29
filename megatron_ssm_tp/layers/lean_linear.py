"""Megatron's linears with less to do on the host where no gradient is wanted.

Megatron's products go through an autograd function and their gradients' all-reduce through another, in inference too,
which costs the host more than the launch does. What is computed is the same to the bit, but for few rows on GPUs
(ops/few_rows.py), which are summed in another order.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import nn

from ..ops.few_rows import few_rows_linear


def is_lean(linear: nn.Module) -> bool:
    """Whether forward is the plain product of a whole sequence with a whole weight, and nothing is recorded."""
    if torch.is_grad_enabled() or linear.sequence_parallel or linear.explicit_expert_comm:
        return False
    return linear.gtp_remat_size == 1 and linear.config._cpu_offloading_context is None


class LeanColumnParallelLinear(ColumnParallelLinear):
    """Megatron's ColumnParallelLinear."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """input_ [.., d] -> [.., h/p], and the bias where skip_bias_add is set."""
        if weight is not None or runtime_gather_output or self.gather_output or not is_lean(self):
            return super().forward(input_, weight, runtime_gather_output)
        if self.skip_bias_add:
            return few_rows_linear(input_, self.weight), self.bias
        if self.bias is None:
            return few_rows_linear(input_, self.weight), None
        return F.linear(input_, self.weight, self.bias), None
