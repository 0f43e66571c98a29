"""Every parameter of a model: its whole shape and the axis and packing by which ranks share it.

Names are those of the Megatron model (`layers.model.SSMModel`). The loader reads by this table, the mixer splits its
distributed checkpoints by it, `plan` prints it, and the tests cut Hugging Face's gradients with it.
"""

from dataclasses import dataclass
from math import prod

from ..config import DTYPES, Mamba1Config, Mamba2Config, ModelConfig
from ..errors import UserError
from .bands import Band, Packing, Uneven
from .plan import LEGAL_LIMIT, Plan, check_tp, legal_tp


@dataclass(frozen=True)
class Parameter:
    """A parameter's whole shape; `axis` is cut by `packing`, or both are None and every rank holds all of it.

    `keep_fp32`: stays float32 when the model is not (A_log and D feed exponentials and long sums).
    """

    shape: tuple[int, ...]
    axis: int | None = None
    packing: Packing | None = None
    keep_fp32: bool = False

    def plan(self, tp: int) -> Plan | None:
        return None if self.packing is None else Plan(self.packing, tp)

    def local_shape(self, tp: int) -> tuple[int, ...]:
        if self.packing is None:
            return self.shape
        return (*self.shape[: self.axis], self.packing.local_size(tp), *self.shape[self.axis + 1 :])

    def local_bytes(self, tp: int, itemsize: int) -> int:
        return prod(self.local_shape(tp)) * (4 if self.keep_fp32 else itemsize)


def mamba1_parameters(mixer: Mamba1Config, hidden_size: int) -> dict[str, Parameter]:
    """Parameters of one Mamba-1 mixer by their names in `layers.mamba1_mixer.Mamba1Mixer`.

    in_proj [2D, h] is packed x over z; conv1d, dt_proj, A_log and D follow x's channels; x_proj [R+2N, D] and
    out_proj [h, D] are cut by columns, so their products are partial sums that the ranks reduce.
    """
    d, n, r = mixer.d_inner, mixer.d_state, mixer.dt_rank
    xz = Packing((Band("x", d, dimension="d_inner"), Band("z", d, dimension="d_inner")))
    channels = Packing((Band("d_inner", d),))
    table = {
        "in_proj.weight": Parameter((2 * d, hidden_size), 0, xz),
        "conv1d_weight": Parameter((d, 1, mixer.d_conv), 0, channels),
        "x_proj.weight": Parameter((r + 2 * n, d), 1, channels),
        "dt_proj.weight": Parameter((d, r), 0, channels),
        "dt_proj.bias": Parameter((d,), 0, channels),
        "A_log": Parameter((d, n), 0, channels, keep_fp32=True),
        "D": Parameter((d,), 0, channels, keep_fp32=True),
        "out_proj.weight": Parameter((hidden_size, d), 1, channels),
    }
    if mixer.conv_bias:
        table["conv1d_bias"] = Parameter((d,), 0, channels)
    if mixer.proj_bias:
        table["in_proj.bias"] = Parameter((2 * d,), 0, xz)
        table["out_proj.bias"] = Parameter((hidden_size,))
    return table


def mamba2_parameters(mixer: Mamba2Config, hidden_size: int) -> dict[str, Parameter]:
    """Parameters of one Mamba-2 mixer by their names in `layers.mamba2_mixer.Mamba2Mixer`.

    in_proj is packed z, x, B, C, dt and the convolution x, B, C, each band cut by itself: z, x and dt by heads, B and C
    by groups. Where the ranks are a multiple of the groups, each keeps the one group that its heads use.
    """
    d, h, g = mixer.d_inner, mixer.n_heads, mixer.n_groups
    if h % g:
        raise UserError("n_groups", g, f"does not divide n_heads ({h})", "a divisor of n_heads")

    def by_head(name: str) -> Band:
        return Band(name, d, units=h, dimension="n_heads")

    def by_group(name: str) -> Band:
        return Band(name, g * mixer.d_state, units=g, uneven=Uneven.REPLICATE, dimension="n_groups")

    channels, heads = Packing((by_head("d_inner"),)), Packing((Band("n_heads", h),))
    convolved = Packing((by_head("x"), by_group("B"), by_group("C")))
    projected = Packing((by_head("z"), *convolved.bands, Band("dt", h, dimension="n_heads")))
    table = {
        "in_proj.weight": Parameter((projected.size, hidden_size), 0, projected),
        "conv1d_weight": Parameter((convolved.size, 1, mixer.d_conv), 0, convolved),
        "dt_bias": Parameter((h,), 0, heads),
        "A_log": Parameter((h,), 0, heads, keep_fp32=True),
        "D": Parameter((h,), 0, heads, keep_fp32=True),
        "out_proj.weight": Parameter((hidden_size, d), 1, channels),
    }
    if mixer.norm:
        table["norm.weight"] = Parameter((d,), 0, channels)
    if mixer.conv_bias:
        table["conv1d_bias"] = Parameter((convolved.size,), 0, convolved)
    if mixer.proj_bias:
        table["in_proj.bias"] = Parameter((projected.size,), 0, projected)
        table["out_proj.bias"] = Parameter((hidden_size,))
    return table


def mixer_parameters(mixer: Mamba1Config | Mamba2Config, hidden_size: int) -> dict[str, Parameter]:
    if isinstance(mixer, Mamba1Config):
        return mamba1_parameters(mixer, hidden_size)
    return mamba2_parameters(mixer, hidden_size)


def layer_prefix(layer: int) -> str:
    return f"decoder.layers.{layer}."


def model_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of the whole model, in the order of the forward pass."""
    vocabulary = Packing((Band("vocab_size", config.vocab_size, uneven=Uneven.PAD),))
    embedding = Parameter((config.vocab_size, config.hidden_size), 0, vocabulary)
    norm = Parameter((config.hidden_size,))
    mixer = mixer_parameters(config.mixer, config.hidden_size)
    table = {"embedding.word_embeddings.weight": embedding}
    for layer in range(config.num_layers):
        table[f"{layer_prefix(layer)}norm.weight"] = norm
        table |= {f"{layer_prefix(layer)}mixer.{name}": parameter for name, parameter in mixer.items()}
    table["decoder.final_norm.weight"] = norm
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


def state_shapes(mixer: Mamba1Config | Mamba2Config, tp: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A request's state in one layer on one rank.

    Mamba-1: conv [D/p, d_conv] and ssm [D/p, N]. Mamba-2: conv [channels of x, B, C here, d_conv] and ssm [H/p, P, N].
    """
    table = mixer_parameters(mixer, 1)
    conv = (table["conv1d_weight"].local_shape(tp)[0], mixer.d_conv)
    if isinstance(mixer, Mamba1Config):
        return conv, table["A_log"].local_shape(tp)
    return conv, (*table["A_log"].local_shape(tp), mixer.head_dim, mixer.d_state)


def all_reduces(config: ModelConfig, tp: int) -> dict[str, tuple[int, int]]:
    """What a layer's mixer reduces over `tp` ranks: name -> values a token, and their bytes.

    The cases of a Mamba-2 norm are those of `layers.gated_norm`.
    """
    mixer, hidden, itemsize = config.mixer, config.hidden_size, DTYPES[config.dtype]
    out_proj = (hidden, hidden * itemsize)
    if isinstance(mixer, Mamba1Config):
        bcdt = mixer.dt_rank + 2 * mixer.d_state
        return {"x_proj": (bcdt, bcdt * itemsize), "out_proj": out_proj}
    norm = mixer.norm
    if norm is None or norm.groups % tp == 0:
        return {"out_proj": out_proj}
    if norm.groups == 1 and config.dtype != "float16":
        values = hidden + sum_columns(config.dtype, tp)
        return {"out_proj with the norm's sums": (values, values * itemsize)}
    return {"norm, float32": (norm.groups, norm.groups * 4), "out_proj": out_proj}


def sum_columns(dtype: str, tp: int) -> int:
    """Columns that carry a float32 sum of squares a token and rank beside a product of `dtype` through one reduction.

    A float32 product has room for one, in which the ranks' parts are summed like the rest. Half precision has not:
    there each rank has columns of its own, where nothing is added to its number, and three pieces of 8 bits make one.
    """
    return 1 if dtype == "float32" else 3 * tp


def state_bytes(config: ModelConfig, tp: int, conv_itemsize: int, ssm_itemsize: int = 4) -> int:
    """Bytes of state a request keeps on one rank, all layers."""
    conv, ssm = state_shapes(config.mixer, tp)
    return config.num_layers * (prod(conv) * conv_itemsize + prod(ssm) * ssm_itemsize)
