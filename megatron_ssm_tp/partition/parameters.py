"""Parameters of single modules: their whole shapes, and the axis and packing by which ranks share them.

Names are those in the modules of `layers`. `layout` puts them together to a model.
"""

from dataclasses import dataclass
from math import prod

from ..config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, SharedBlocksConfig
from ..errors import UserError
from .bands import Band, Packing, Uneven
from .plan import Plan

Mixer = Mamba1Config | Mamba2Config


@dataclass(frozen=True)
class Parameter:
    """A parameter's whole shape; `axis` is cut by `packing`, or every rank holds all of it.

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


Table = dict[str, Parameter]


def mamba1_parameters(mixer: Mamba1Config, hidden_size: int) -> Table:
    """Parameters of one Mamba-1 mixer by their names in `layers.mamba1_mixer.Mamba1Mixer`.

    in_proj [2D, h] is packed x over z, or row by row in turn where the config says interleaved; conv1d, dt_proj, A_log
    and D follow x's channels; x_proj [R+2N, D] and out_proj [h, D] are cut by columns, so their products are partial
    sums that the ranks reduce. A head's columns of x_proj act on its own channels only.
    """
    d, n, r, heads = mixer.d_inner, mixer.d_state, mixer.dt_rank, mixer.n_heads
    if d % heads:
        raise UserError("n_mamba_heads", heads, f"does not divide d_inner ({d})", "a divisor of d_inner")

    def channels(name: str) -> Band:
        return Band(name, d, dimension="d_inner", sections=heads)

    xz = Packing((channels("x"), channels("z")), interleaved=mixer.interleaved)
    inner = Packing((channels("d_inner"),))
    table = {
        "in_proj.weight": Parameter((2 * d, hidden_size), 0, xz),
        "conv1d_weight": Parameter((d, 1, mixer.d_conv), 0, inner),
        "x_proj.weight": Parameter((r + 2 * n, d), 1, inner),
        "dt_proj.weight": Parameter((d, r), 0, inner),
        "dt_proj.bias": Parameter((d,), 0, inner),
        "A_log": Parameter((d, n), 0, inner, keep_fp32=True),
        "D": Parameter((d,), 0, inner, keep_fp32=True),
        "out_proj.weight": Parameter((hidden_size, d), 1, inner),
    }
    if mixer.conv_bias:
        table["conv1d_bias"] = Parameter((d,), 0, inner)
    if mixer.proj_bias:
        table["in_proj.bias"] = Parameter((2 * d,), 0, xz)
        table["out_proj.bias"] = Parameter((hidden_size,))
    return table


def mamba2_parameters(mixer: Mamba2Config, hidden_size: int) -> Table:
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
    if mixer.in_bias:
        table["in_proj.bias"] = Parameter((projected.size,), 0, projected)
    if mixer.out_bias:
        table["out_proj.bias"] = Parameter((hidden_size,))
    return table


def mixer_parameters(mixer: Mixer, hidden_size: int) -> Table:
    if isinstance(mixer, Mamba1Config):
        return mamba1_parameters(mixer, hidden_size)
    return mamba2_parameters(mixer, hidden_size)


def _query_key_value(attention: AttentionConfig) -> Packing:
    """q by heads; k and v by theirs, which ranks share where there are more ranks."""
    heads, kv, width = attention.n_heads, attention.n_kv_heads, attention.head_dim
    if heads % kv:
        raise UserError("num_key_value_heads", kv, f"does not divide num_attention_heads ({heads})", "a divisor of it")
    shared = {"units": kv, "uneven": Uneven.REPLICATE, "dimension": "num_key_value_heads"}
    query = Band("q", heads * width, units=heads, dimension="num_attention_heads")
    return Packing((query, Band("k", kv * width, **shared), Band("v", kv * width, **shared)))


def attention_parameters(attention: AttentionConfig, hidden_size: int) -> Table:
    """Parameters of one attention module by their names in `layers.attention.Attention`."""
    packed = _query_key_value(attention)
    heads = Packing((packed.bands[0],))
    table = {
        "qkv.weight": Parameter((packed.size, attention.d_in), 0, packed),
        "out_proj.weight": Parameter((hidden_size, heads.size), 1, heads),
    }
    if attention.qkv_bias:
        table["qkv.bias"] = Parameter((packed.size,), 0, packed)
    if attention.out_bias:
        table["out_proj.bias"] = Parameter((hidden_size,))
    return table


def _gate_up(mlp: MLPConfig) -> Packing:
    names = ("gate", "up") if mlp.gated else ("up",)
    return Packing(tuple(Band(name, mlp.d_ff, dimension="intermediate_size") for name in names))


def mlp_parameters(mlp: MLPConfig, hidden_size: int) -> Table:
    """Parameters of one MLP by their names in `layers.mlp.MLP`: up [gate; up] by rows, down by columns."""
    packed = _gate_up(mlp)
    inner = Packing((Band("intermediate_size", mlp.d_ff),))
    table = {
        "up.weight": Parameter((packed.size, hidden_size), 0, packed),
        "down.weight": Parameter((hidden_size, mlp.d_ff), 1, inner),
    }
    if mlp.bias:
        table["up.bias"] = Parameter((packed.size,), 0, packed)
        table["down.bias"] = Parameter((hidden_size,))
    return table


def adapter_parameters(d_in: int, rank: int, packing: Packing) -> Table:
    """A low-rank addition to a column-parallel product: down whole on every rank, up cut like the product."""
    return {"down.weight": Parameter((rank, d_in)), "up.weight": Parameter((packing.size, rank), 0, packing)}


def adapter_tables(
    shared: SharedBlocksConfig, attention: AttentionConfig, mlp: MLPConfig, hidden_size: int
) -> dict[str, Table]:
    """The adapters of one call of a shared block: name -> its parameters."""
    tables = {}
    if shared.attention_adapter_rank:
        for band in _query_key_value(attention).bands:
            tables[band.name] = adapter_parameters(attention.d_in, shared.attention_adapter_rank, Packing((band,)))
    if shared.mlp_adapter_rank:
        tables["up"] = adapter_parameters(hidden_size, shared.mlp_adapter_rank, _gate_up(mlp))
    return tables


def prefixed(prefix: str, table: Table) -> Table:
    return {f"{prefix}{name}": parameter for name, parameter in table.items()}


def shared_block_parameters(attention: AttentionConfig, mlp: MLPConfig, hidden_size: int) -> Table:
    """Parameters of one block by their names in `layers.shared_block.SharedBlock`."""
    return {
        "input_norm.weight": Parameter((attention.d_in,)),
        **prefixed("attention.", attention_parameters(attention, hidden_size)),
        "mlp_norm.weight": Parameter((hidden_size,)),
        **prefixed("mlp.", mlp_parameters(mlp, hidden_size)),
    }
