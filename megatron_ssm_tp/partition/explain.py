"""A plan in words: which rows and columns of which tensor go to which rank, and what that costs in bytes."""

from collections.abc import Callable, Iterator

from ..config import DTYPES, ModelConfig
from .layout import Parameter, layer_prefix, legal_tp_sizes, model_parameters, state_bytes
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
    mixer, itemsize = config.mixer, DTYPES[config.dtype]
    tied = "tied" if config.tied_embeddings else "untied"
    yield (
        f"{config.family}: {config.num_layers} layers, hidden {config.hidden_size}, d_inner {mixer.d_inner}, "
        f"d_state {mixer.d_state}, dt_rank {mixer.dt_rank}, vocabulary {config.vocab_size} {tied}, {config.dtype}"
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
        bcdt = mixer.dt_rank + 2 * mixer.d_state
        yield (
            f"all-reduces a layer: 2, of {bcdt} (x_proj) and {config.hidden_size} (out_proj) values a token: "
            f"{(bcdt + config.hidden_size) * itemsize:,} bytes"
        )


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
            parts.append(f"{label}{found.start}:{found.stop}{step}")
        held = sum(piece.stop - piece.start for piece in plan.pieces(rank))
        if held < plan.local_size:
            parts.append(f"{plan.local_size - held} of padding")
        yield f"    rank {rank}  {list(parameter.local_shape(tp))}  {', '.join(parts)}"
