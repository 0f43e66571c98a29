"""What every kind of layer sends in a forward pass: the table that `plan` prints and a test holds the layers to."""

from dataclasses import dataclass

from ..config import DTYPES, Layer, Mamba1Config, Mamba2Config, ModelConfig


@dataclass(frozen=True)
class Reduction:
    """An all-reduce among `ranks` neighbouring ranks: `values` a token of a dtype with `itemsize` bytes."""

    site: str
    values: int
    itemsize: int
    ranks: int

    @property
    def bytes(self) -> int:
        """Bytes a token."""
        return self.values * self.itemsize


def sum_columns(dtype: str, tp: int) -> int:
    """Columns that carry a float32 sum of squares a token and rank beside a product of `dtype` through one reduction.

    A float32 product has room for one, in which the ranks' parts are summed like the rest. Half precision has not:
    there each rank has columns of its own, where nothing is added to its number, and three pieces of 8 bits make one.
    They are a multiple of 16, so that rows stay multiples of 32 bytes where the product's are, and words of 16 are
    loaded.
    """
    return 1 if dtype == "float32" else -(-3 * tp // 16) * 16


def all_reduces(config: ModelConfig, kind: Layer, tp: int) -> list[Reduction]:
    """The all-reduces of one layer of this kind over `tp` ranks, in their order; none at tp 1.

    A product by rows of h = hidden_size columns costs one of h values. A Mamba-1 mixer has a second for x_proj, among
    the ranks that share a head's channels; a Mamba-2 mixer's norm none, unless its groups span some ranks but not all.
    """
    if tp == 1:
        return []
    itemsize, hidden = DTYPES[config.dtype], config.hidden_size

    def product(site: str, values: int = hidden) -> Reduction:
        return Reduction(site, values, itemsize, tp)

    if kind is Layer.ATTENTION:
        return [product("attention out_proj")]
    if kind is Layer.MLP:
        return [product("MLP down")]
    inner, riding = _inside_mixer(config, tp)
    if kind is Layer.PARALLEL:
        if riding:  # scaled after the reduction, so it cannot be added to attention's product before
            return [*inner, product("out_proj, the norm's sums, attention out_proj", 2 * hidden + riding)]
        return [*inner, product("out_proj + attention out_proj")]
    out = product("out_proj and the norm's sums" if riding else "out_proj", hidden + riding)
    block = [product("shared attention out_proj"), product("shared MLP down")] if kind is Layer.SHARED else []
    return [*block, *inner, out]


def _inside_mixer(config: ModelConfig, tp: int) -> tuple[list[Reduction], int]:
    """Reductions before out_proj's, and columns that ride in out_proj's. The cases are those of `layers.gated_norm`."""
    mixer, itemsize = config.mixer, DTYPES[config.dtype]
    if isinstance(mixer, Mamba1Config):
        values = mixer.dt_rank + 2 * mixer.d_state
        sharers = tp // mixer.n_heads
        return ([Reduction("x_proj", values, itemsize, sharers)] if sharers > 1 else []), 0
    return _inside_mamba2(mixer, config.dtype, tp)


def _inside_mamba2(mixer: Mamba2Config, dtype: str, tp: int) -> tuple[list[Reduction], int]:
    norm = mixer.norm
    if norm is None or norm.groups % tp == 0:
        return [], 0
    if norm.groups == 1 and dtype != "float16":
        return [], sum_columns(dtype, tp)
    return [Reduction("norm", 1, 4, tp // norm.groups)], 0
