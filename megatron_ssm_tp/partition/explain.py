"""A plan in words: which rows and columns of which tensor go to which rank, and what that costs in bytes."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from ..config import DTYPES, Layer, Mamba1Config, ModelConfig
from .layout import block_prefix, kv_bytes, layer_prefix, legal_tp_sizes, model_parameters, state_bytes
from .parameters import Mixer, Parameter
from .plan import LEGAL_LIMIT
from .reductions import all_reduces

_LAYER = re.compile(r"\.layers\.\d+\.")  # stands for all layers of its kind
_AXES = ("rows", "columns")
_KINDS = {
    Layer.SSM: "SSM",
    Layer.ATTENTION: "attention",
    Layer.MLP: "MLP",
    Layer.PARALLEL: "SSM beside attention",
    Layer.SHARED: "shared block and SSM",
}


def rank_bytes(config: ModelConfig, tp: int) -> int:
    """Bytes of parameters on one rank, vocabulary padding included; every rank has the same."""
    itemsize = DTYPES[config.dtype]
    return sum(parameter.local_bytes(tp, itemsize) for parameter in model_parameters(config).values())


def explain(config: ModelConfig, tp: int, file_names: Callable[[str], Sequence[str]]) -> Iterator[str]:
    """The plan of a model for `tp` ranks, a line at a time; layers of a kind are alike, so the first stands for all.

    `file_names` gives the checkpoint's names of one of our parameters.
    """
    tied = "tied" if config.tied_embeddings else "untied"
    yield (
        f"{config.family}: {len(config.layers)} layers, hidden {config.hidden_size}, {_dimensions(config.mixer)}, "
        f"vocabulary {config.vocab_size} {tied}, {config.dtype}"
    )
    kinds = Counter(config.layers)
    if config.attention:
        counted = ", ".join(f"{count} {_KINDS[kind]}" for kind, count in kinds.items())
        yield f"layers: {counted}; {_attention(config, tp)}"
    yield f"legal TP sizes (to {LEGAL_LIMIT}): {', '.join(map(str, legal_tp_sizes(config)))}"
    yield ""
    shown = [layer_prefix(config.layers.index(kind)) for kind in kinds] + [block_prefix(0)]
    for name, parameter in model_parameters(config).items():
        if not name.startswith(("decoder.layers.", "decoder.shared_blocks.")) or name.startswith(tuple(shown)):
            names = [_LAYER.sub(".layers.*.", stored) for stored in file_names(name)]
            yield from _explain_parameter(names, parameter, tp)
    yield ""
    yield from _costs(config, tp, kinds)


def _costs(config: ModelConfig, tp: int, kinds: Counter) -> Iterator[str]:
    """Bytes that a rank holds, and what its layers send."""
    itemsize = DTYPES[config.dtype]
    weights, state = rank_bytes(config, tp), state_bytes(config, tp, itemsize)
    per_request = f"{state:,} bytes of state for each running request"
    if config.attention:
        per_request += f" and {kv_bytes(config, tp, itemsize):,} bytes of keys and values for each of its tokens"
    yield f"a rank of {tp} holds {weights:,} bytes of weights, and {per_request}"
    for kind, count in kinds.items() if tp > 1 else ():
        sent = all_reduces(config, kind, tp)
        parts = ", ".join(f"{r.values} values ({r.site}, {r.ranks} ranks)" for r in sent)
        number = f"{len(sent)} all-reduce{'s' if len(sent) > 1 else ''}"
        yield f"{_KINDS[kind]} layer (x {count}): {number}, {sum(r.bytes for r in sent):,} bytes a token: {parts}"


def _dimensions(mixer: Mixer) -> str:
    if isinstance(mixer, Mamba1Config):
        heads = f"{mixer.n_heads} mamba heads, " if mixer.n_heads > 1 else ""
        return f"{heads}d_inner {mixer.d_inner}, d_state {mixer.d_state}, dt_rank {mixer.dt_rank}"
    return f"{mixer.n_heads} heads of {mixer.head_dim}, {mixer.n_groups} groups, d_state {mixer.d_state}"


def _attention(config: ModelConfig, tp: int) -> str:
    attention = config.attention
    copies = tp // attention.n_kv_heads
    shared = f", each kept by {copies} ranks" if copies > 1 else ""
    called = f", {config.kv_caches} calls of {config.shared.count} shared blocks" if config.shared else ""
    return (
        f"attention of {attention.n_heads} heads of {attention.head_dim}, "
        f"{attention.n_kv_heads} of keys and values{shared}{called}"
    )


def _explain_parameter(names: Sequence[str], parameter: Parameter, tp: int) -> Iterator[str]:
    """Where each rank's share lies in the file: in its one tensor, or in the one of each band."""
    whole = f"{' + '.join(names)}  {list(parameter.shape)}"
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
            found = plan.global_slice(piece) if len(names) == 1 else slice(piece.start, piece.stop, 1)
            step = f":{found.step}" if found.step > 1 else ""
            label = f"{bands[piece.band].name} " if len(bands) > 1 else ""
            copies = " (shared)" if bands[piece.band].is_shared(tp) else ""
            parts.append(f"{label}{found.start}:{found.stop}{step}{copies}")
        held = sum(piece.stop - piece.start for piece in plan.pieces(rank))
        if held < plan.local_size:
            parts.append(f"{plan.local_size - held} of padding")
        yield f"    rank {rank}  {list(parameter.local_shape(tp))}  {', '.join(parts)}"
