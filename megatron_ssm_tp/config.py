"""What a model is: dimensions read from a checkpoint, frozen. Imports nothing of ours; everyone may import it."""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # name: bytes


class Layer(Enum):
    """A kind of layer. SSM, ATTENTION, MLP and PARALLEL are x + f(norm(x)), with f as named."""

    SSM = "ssm"
    ATTENTION = "attention"
    MLP = "mlp"
    PARALLEL = "parallel"  # an SSM mixer and attention side by side, summed (Falcon-H1)
    SHARED = "shared"  # a transformer block that several layers share, then an SSM mixer (Zamba, Zamba2)


@dataclass(frozen=True)
class Mamba1Config:
    """Dimensions of one Mamba-1 mixer (paper: Gu & Dao 2023, section 3; HF: MambaMixer, FalconMambaMixer).

    `bcdt_norm_eps` is the epsilon of the RMS norms without weight on dt, B and C (Falcon-Mamba), or None for no norms.
    `n_heads` runs of channels have dt, B and C of their own, and x and z lie row by row in turn in `interleaved` files
    (HF ZambaMambaMixer).
    """

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    proj_bias: bool = False
    conv_bias: bool = True
    bcdt_norm_eps: float | None = None
    n_heads: int = 1
    interleaved: bool = False


@dataclass(frozen=True)
class GatedNormConfig:
    """The RMS norm between scan and out_proj: over d_inner / groups channels, after the gate or before it."""

    eps: float
    groups: int = 1
    before_gate: bool = False


@dataclass(frozen=True)
class Mamba2Config:
    """Dimensions of one Mamba-2 mixer (paper: Dao & Gu 2024; HF: Mamba2Mixer). d_inner = n_heads x head_dim.

    `norm` None: the output is gated and not normalized. `dt_limit` clamps dt after its softplus. `in_multiplier` scales
    the input, `band_multipliers` what in_proj makes of it: z, x, B, C, dt (HF FalconH1Mixer).
    """

    n_heads: int
    head_dim: int
    n_groups: int
    d_state: int
    d_conv: int
    norm: GatedNormConfig | None
    in_bias: bool = False
    conv_bias: bool = True
    out_bias: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    in_multiplier: float = 1.0
    band_multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary embedding of the first `dim` channels of a head, half against half; `factor` stretches positions."""

    theta: float
    dim: int
    factor: float = 1.0


@dataclass(frozen=True)
class AttentionConfig:
    """Causal attention of `d_in` -> hidden_size; keys and values have `n_kv_heads` heads.

    `rotary` None: no positions. `scale` multiplies the scores, `key_multiplier` the keys, `in_multiplier` the input
    (HF FalconH1Attention).
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_in: int
    scale: float
    rotary: RotaryConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    in_multiplier: float = 1.0
    key_multiplier: float = 1.0


@dataclass(frozen=True)
class MLPConfig:
    """down(act(up x)), or down(act(gate x) * up x) if `gated`; `activation` is one of layers.mlp.ACTIVATIONS."""

    d_ff: int
    activation: str
    gated: bool
    bias: bool = False
    gate_multiplier: float = 1.0
    out_multiplier: float = 1.0


@dataclass(frozen=True)
class SharedBlocksConfig:
    """Transformer blocks on [hidden, embedding] that layers of kind SHARED call in turn (HF Zamba, Zamba2).

    Low-rank adapters of the given rank are added to q, k, v and to the MLP's up projection, one set a call; None: none.
    """

    count: int
    attention_adapter_rank: int | None = None
    mlp_adapter_rank: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A whole language model, whatever file it came from.

    `vocab_size` is what users see (logits have this width); ranks hold rows padded to a multiple of the TP size.
    `dtype` is the checkpoint's own, one of DTYPES. Layers of one kind are alike. The multipliers are Falcon-H1's:
    `ssm_multiplier` and `attention_multiplier` scale the two halves of a PARALLEL layer.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm_eps: float
    tied_embeddings: bool
    residual_in_fp32: bool
    dtype: str
    mixer: Mamba1Config | Mamba2Config
    attention: AttentionConfig | None = None
    mlp: MLPConfig | None = None
    shared: SharedBlocksConfig | None = None
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    ssm_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @cached_property
    def callers(self) -> tuple[int, ...]:
        """The layers that call shared blocks, in turn."""
        return tuple(index for index, kind in enumerate(self.layers) if kind is Layer.SHARED)

    def count(self, *kinds: Layer) -> int:
        """Layers of these kinds."""
        return sum(layer in kinds for layer in self.layers)

    @property
    def is_pure_ssm(self) -> bool:
        """Whether every layer is an SSM mixer and nothing else."""
        return self.count(Layer.SSM) == len(self.layers)

    @property
    def ssm_states(self) -> int:
        """States that a request keeps: one for every SSM mixer."""
        return self.count(Layer.SSM, Layer.PARALLEL, Layer.SHARED)

    @property
    def kv_caches(self) -> int:
        """Caches of keys and values that a request keeps: one for every call of attention."""
        return self.count(Layer.ATTENTION, Layer.PARALLEL, Layer.SHARED)
