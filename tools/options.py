"""What several tools are asked: shapes of batches, and ranks that can share a model."""

from megatron_ssm_tp.config import ModelConfig
from megatron_ssm_tp.errors import UserError, renamed
from megatron_ssm_tp.partition.layout import check_tp_size


def read_shape(text: str) -> tuple[int, int]:
    """Prompts and tokens of each, of PROMPTSxTOKENS."""
    batch, _, length = text.partition("x")
    if not all(part.isascii() and part.isdigit() and int(part) for part in (batch, length)):
        raise UserError("--shapes", text, "is no batch of prompts", "prompts x tokens, such as 8x2048")
    return int(batch), int(length)


def check_ranks(config: ModelConfig, ranks: int) -> None:
    """Raises UserError: the model cannot be cut for so many ranks, which torchrun was asked for."""
    with renamed(lambda field: "--nproc-per-node" if field == "tensor_model_parallel_size" else field):
        check_tp_size(config, ranks)
