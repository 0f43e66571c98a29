"""Rows of a vocabulary that is shared out over ranks: zeros for tokens whose rows lie elsewhere."""

import torch

from .choose import kernels_can_take


def embedding_rows(token_ids: torch.Tensor, weight: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
    """What VocabParallelEmbedding makes before it sums over the ranks, in one kernel for its eight.

    Args:
        token_ids: int64 [T]; any that no rank has gives zeros.
        weight: [V/p, h], of the tokens from `first` on.
        dtype: of the result.

    Returns:
        [T, h].
    """
    if kernels_can_take(token_ids, weight):
        from .embedding_triton import rows_of

        return rows_of(token_ids, weight, first, dtype)
    rows = token_ids - first
    here = (rows >= 0) & (rows < weight.shape[0])
    return torch.where(here[:, None], weight[rows.clamp(0, weight.shape[0] - 1)], 0).to(dtype)
