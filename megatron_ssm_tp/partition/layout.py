"""Every parameter of a model: its whole shape and the axis and packing by which ranks share it.

Names are those of the Megatron model (`layers.model.SSMModel`). The loader reads by this table, the mixer splits its
distributed checkpoints by it, `plan` prints it, and the tests cut Hugging Face's gradients with it.
"""

from math import prod

from ..config import Layer, Mamba1Config, ModelConfig
from .bands import Band, Packing, Uneven
from .parameters import (
    Mixer,
    Parameter,
    Table,
    adapter_tables,
    attention_parameters,
    mixer_parameters,
    mlp_parameters,
    prefixed,
    shared_block_parameters,
)
from .plan import LEGAL_LIMIT, check_tp, legal_tp


def layer_parameters(config: ModelConfig, kind: Layer) -> Table:
    """Parameters of one layer of this kind."""
    hidden = config.hidden_size
    norm = {"norm.weight": Parameter((hidden,))}
    if kind is Layer.ATTENTION:
        return norm | prefixed("mixer.", attention_parameters(config.attention, hidden))
    if kind is Layer.MLP:
        return norm | prefixed("mixer.", mlp_parameters(config.mlp, hidden))
    ssm = mixer_parameters(config.mixer, hidden)
    if kind is Layer.PARALLEL:
        attention = prefixed("mixer.attention.", attention_parameters(config.attention, hidden))
        return norm | prefixed("mixer.ssm.", ssm) | attention
    table = norm | prefixed("mixer.", ssm)
    if kind is Layer.SHARED:
        table["linear.weight"] = Parameter((hidden, hidden))
        for name, adapter in adapter_tables(config.shared, config.attention, config.mlp, hidden).items():
            table |= prefixed(f"adapters.{name}.", adapter)
    return table


def layer_prefix(layer: int) -> str:
    return f"decoder.layers.{layer}."


def block_prefix(block: int) -> str:
    return f"decoder.shared_blocks.{block}."


def model_parameters(config: ModelConfig) -> Table:
    """Parameters of the whole model, in the order of the forward pass; the shared blocks stand before the layers."""
    vocabulary = Packing((Band("vocab_size", config.vocab_size, uneven=Uneven.PAD),))
    embedding = Parameter((config.vocab_size, config.hidden_size), 0, vocabulary)
    table = {"embedding.word_embeddings.weight": embedding}
    if config.shared:
        block = shared_block_parameters(config.attention, config.mlp, config.hidden_size)
        for index in range(config.shared.count):
            table |= prefixed(block_prefix(index), block)
    kinds = {kind: layer_parameters(config, kind) for kind in dict.fromkeys(config.layers)}
    for index, kind in enumerate(config.layers):
        table |= prefixed(layer_prefix(index), kinds[kind])
    table["decoder.final_norm.weight"] = Parameter((config.hidden_size,))
    if not config.tied_embeddings:
        table["output_layer.weight"] = embedding
    return table


def _packings(config: ModelConfig) -> list[Packing]:
    # A dict keeps the order of the forward pass and drops repeats: one error names the first band in the way.
    return list(dict.fromkeys(p.packing for p in model_parameters(config).values() if p.packing))


def legal_tp_sizes(config: ModelConfig, limit: int = LEGAL_LIMIT) -> list[int]:
    """TP sizes up to `limit` at which this model can be cut."""
    return legal_tp(_packings(config), limit)


def check_tp_size(config: ModelConfig, tp: int) -> None:
    """Raises UserError with the legal sizes unless the model can be cut for `tp` ranks."""
    check_tp(_packings(config), tp)


def padded_vocab_size(config: ModelConfig, tp: int) -> int:
    """Rows of embedding and head over all ranks: the vocabulary rounded up to a multiple of `tp`."""
    return tp * model_parameters(config)["embedding.word_embeddings.weight"].local_shape(tp)[0]


def state_shapes(mixer: Mixer, tp: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A request's state in one layer on one rank.

    Mamba-1: conv [D/p, d_conv] and ssm [D/p, N]. Mamba-2: conv [channels of x, B, C here, d_conv] and ssm [H/p, P, N].
    """
    table = mixer_parameters(mixer, 1)
    conv = (table["conv1d_weight"].local_shape(tp)[0], mixer.d_conv)
    if isinstance(mixer, Mamba1Config):
        return conv, table["A_log"].local_shape(tp)
    return conv, (*table["A_log"].local_shape(tp), mixer.head_dim, mixer.d_state)


def state_bytes(config: ModelConfig, tp: int, conv_itemsize: int, ssm_itemsize: int = 4) -> int:
    """Bytes of state a request keeps on one rank, all layers."""
    conv, ssm = state_shapes(config.mixer, tp)
    return config.ssm_states * (prod(conv) * conv_itemsize + prod(ssm) * ssm_itemsize)


def kv_bytes(config: ModelConfig, tp: int, itemsize: int) -> int:
    """Bytes of keys and values that a token of a request keeps on one rank, all calls of attention."""
    if config.attention is None:
        return 0
    heads = max(1, config.attention.n_kv_heads // tp)
    return config.kv_caches * 2 * heads * config.attention.head_dim * itemsize
