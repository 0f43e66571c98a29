"""What Triton's interpreter is asked about a vocabulary's rows and rows of logits."""

import torch
from interpreter import patch_interpreter

from megatron_ssm_tp.ops.argmax_triton import argmax_of_rows
from megatron_ssm_tp.ops.embedding import embedding_rows
from megatron_ssm_tp.ops.embedding_triton import rows_of


def argmax(rows: int, columns: int, most: int) -> bool:
    """Whether places are torch's; of rows with gaps between them, and of values of which many are tied."""
    patch_interpreter()
    x = torch.randint(-most, most, (rows, columns + 3), generator=torch.Generator().manual_seed(columns)).float()
    x = x[:, :columns]
    x[-1, columns // 2 :] = float("-inf")
    odd = torch.full((2, columns), torch.nan)
    odd[1, 0] = 1.0
    return torch.equal(argmax_of_rows(x), x.argmax(-1)) and argmax_of_rows(odd).tolist() == [0, 0]


def embedding(first: int, tokens: list[int], columns: int, dtype: torch.dtype) -> bool:
    """Whether rows are those of the reference."""
    patch_interpreter()
    weight = torch.randn(7, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    ids = torch.tensor(tokens)
    return all(
        torch.equal(rows_of(ids, weight, first, d), embedding_rows(ids, weight, first, d))
        for d in (dtype, torch.float32)
    )
