"""What a model is: dimensions read from a checkpoint, frozen. Imports nothing of ours; everyone may import it."""

from dataclasses import dataclass

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # name: bytes


@dataclass(frozen=True)
class Mamba1Config:
    """Dimensions of one Mamba-1 mixer (paper: Gu & Dao 2023, section 3; HF: MambaMixer, FalconMambaMixer).

    `bcdt_norm_eps` is the epsilon of the RMS norms without weight on dt, B and C (Falcon-Mamba), or None for no norms.
    """

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    proj_bias: bool = False
    conv_bias: bool = True
    bcdt_norm_eps: float | None = None


@dataclass(frozen=True)
class GatedNormConfig:
    """The RMS norm between scan and out_proj: over d_inner / groups channels, after the gate or before it."""

    eps: float
    groups: int = 1
    before_gate: bool = False


@dataclass(frozen=True)
class Mamba2Config:
    """Dimensions of one Mamba-2 mixer (paper: Dao & Gu 2024; HF: Mamba2Mixer). d_inner = n_heads x head_dim.

    `norm` None: the output is gated and not normalized. `dt_limit` clamps dt after its softplus.
    """

    n_heads: int
    head_dim: int
    n_groups: int
    d_state: int
    d_conv: int
    norm: GatedNormConfig | None
    proj_bias: bool = False
    conv_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, float("inf"))

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim


@dataclass(frozen=True)
class ModelConfig:
    """A whole language model, whatever file it came from.

    `vocab_size` is what users see (logits have this width); ranks hold rows padded to a multiple of the TP size.
    `dtype` is the checkpoint's own, one of DTYPES.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    norm_eps: float
    tied_embeddings: bool
    residual_in_fp32: bool
    dtype: str
    mixer: Mamba1Config | Mamba2Config
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
