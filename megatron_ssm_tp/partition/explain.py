"""A plan in words: which rows and columns of which tensor go to which rank, and what that costs in bytes."""

from collections.abc import Callable, Iterator

from ..config import DTYPES, Mamba1Config, Mamba2Config, ModelConfig
from .layout import Parameter, all_reduces, layer_prefix, legal_tp_sizes, model_parameters, state_bytes
from .plan import LEGAL_LIMIT

_AXES = ("rows", "columns")
_FIRST_LAYER = layer_prefix(0)


def rank_bytes(config: ModelConfig, tp: int) -> int:
    """Bytes of parameters on one rank, vocabulary padding included; every rank has the same."""
    itemsize = DTYPES[config.dtype]
    return sum(parameter.local_bytes(tp, itemsize) for parameter in model_parameters(config).values())


def explain(config: ModelConfig, tp: int, file_name: Callable[[str], str]) -> Iterator[str]:
    """The plan of a model for `tp` ranks, a line at a time; layers are alike, so one stands for all.

    `file_name` gives the checkpoint's name of one of our parameters.
    """
    itemsize = DTYPES[config.dtype]
    tied = "tied" if config.tied_embeddings else "untied"
    yield (
        f"{config.family}: {config.num_layers} layers, hidden {config.hidden_size}, {_dimensions(config.mixer)}, "
        f"vocabulary {config.vocab_size} {tied}, {config.dtype}"
    )
    yield f"legal TP sizes (to {LEGAL_LIMIT}): {', '.join(map(str, legal_tp_sizes(config)))}"
    yield ""
    for name, parameter in model_parameters(config).items():
        if name.startswith(_FIRST_LAYER):
            shown = file_name(name).replace(".0.", ".*.", 1)
        elif name.startswith("decoder.layers."):
            continue
        else:
            shown = file_name(name)
        yield from _explain_parameter(shown, parameter, tp)
    yield ""
    weights, state = rank_bytes(config, tp), state_bytes(config, tp, itemsize)
    yield f"a rank of {tp} holds {weights:,} bytes of weights, and {state:,} bytes of state for each running request"
    if tp > 1:
        reductions = all_reduces(config, tp)
        parts = " and ".join(f"{values} ({name})" for name, (values, _) in reductions.items())
        plural = "s" if len(reductions) > 1 else ""
        yield (
            f"all-reduce{plural} a layer: {len(reductions)}, of {parts} values a token: "
            f"{sum(size for _, size in reductions.values()):,} bytes"
        )


def _dimensions(mixer: Mamba1Config | Mamba2Config) -> str:
    if isinstance(mixer, Mamba1Config):
        return f"d_inner {mixer.d_inner}, d_state {mixer.d_state}, dt_rank {mixer.dt_rank}"
    return f"{mixer.n_heads} heads of {mixer.head_dim}, {mixer.n_groups} groups, d_state {mixer.d_state}"


def _explain_parameter(name: str, parameter: Parameter, tp: int) -> Iterator[str]:
    whole = f"{name}  {list(parameter.shape)}"
    plan = parameter.plan(tp)
    if plan is None or tp == 1:
        yield f"{whole}  whole on every rank" if tp > 1 else f"{whole}  whole"
        return
    dtype = ", float32 always" if parameter.keep_fp32 else ""
    yield f"{whole}  cut by {_AXES[parameter.axis]}{dtype}"
    bands = plan.packing.bands
    for rank in range(tp):
        parts = []
        for piece in plan.pieces(rank):
            found = plan.global_slice(piece)
            step = f":{found.step}" if found.step > 1 else ""
            label = f"{bands[piece.band].name} " if len(bands) > 1 else ""
            copies = " (shared)" if bands[piece.band].is_shared(tp) else ""
            parts.append(f"{label}{found.start}:{found.stop}{step}{copies}")
        held = sum(piece.stop - piece.start for piece in plan.pieces(rank))
        if held < plan.local_size:
            parts.append(f"{plan.local_size - held} of padding")
        yield f"    rank {rank}  {list(parameter.local_shape(tp))}  {', '.join(parts)}"
