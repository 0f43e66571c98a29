"""Where a forward pass's time goes: GPU time of kernels by the part of a layer that launched them.

Parts are ranges of the profiler around modules and functions; a kernel belongs to the innermost range that its launch,
on the host, lies in. Without a GPU it is the host's own time in each range.
"""

import functools
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_ssm_tp.comm import mappings
from megatron_ssm_tp.layers import layer as layer_module
from megatron_ssm_tp.layers.attention import Attention
from megatron_ssm_tp.layers.mamba1_mixer import Mamba1Mixer
from megatron_ssm_tp.layers.mixer import SSMMixer
from megatron_ssm_tp.layers.mlp import MLP
from megatron_ssm_tp.layers.shared_block import SharedBlock

REDUCTIONS, AROUND, REST, OUTSIDE = "reductions", "norms + residual", "other", "outside the layers"
PARTS = (
    *("in_proj", "conv", "x_proj", "dt_proj", "scan", "gated norm", "out_proj", "attention", "mlp"),
    *(AROUND, REDUCTIONS, REST),
)
_CHILDREN = {name: name for name in ("in_proj", "x_proj", "dt_proj", "out_proj")} | {"norm": "gated norm"}
_MODULES = ((MambaLayer, AROUND), (SSMMixer, REST), (SharedBlock, REST), (Attention, "attention"), (MLP, "mlp"))
_PREFIX = "part: "


def _ranged[**P, T](part: str, function: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with record_function(_PREFIX + part):
            return function(*args, **kwargs)

    return inside


def _places(model: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """(object, attribute, part): what is put into ranges."""
    yield torch.distributed, "all_reduce", REDUCTIONS
    yield mappings, "all_reduce", REDUCTIONS
    yield layer_module, "all_reduce_add_norm", REDUCTIONS
    for module in model.modules():
        part = next((part for kind, part in _MODULES if isinstance(module, kind)), None)
        if part:
            yield module, "forward", part
        if isinstance(module, layer_module.MixerLayer):
            yield module, "with_next_norm", AROUND
            yield module, "sum_and_norm", AROUND
            yield module, "partial", REST
        if isinstance(module, SSMMixer):
            yield module, "ssm_prefill", "scan"
            yield module, "ssm_decode", "scan"
            yield module, "project", "in_proj"
            yield module.out_proj, "_forward_impl", "out_proj"  # taken apart from its sum, it is not called as a whole
            yield from (
                (child, "forward", _CHILDREN[name]) for name, child in module.named_children() if name in _CHILDREN
            )
            if module.last_linear is None:  # a norm whose sums travel with out_proj's product
                yield module.norm, "packed_product", "gated norm"
                yield module.norm, "unpack", "gated norm"
        if isinstance(module, Mamba1Mixer):
            yield module.x_proj, "_forward_impl", "x_proj"
            yield module, "_x_proj_beside_z", "in_proj"


@contextmanager
def ranges(model: nn.Module) -> Iterator[None]:
    """Within it the parts of `model`, one of this package's, are ranges of the profiler."""
    with ExitStack() as stack:
        for owner, attribute, part in list(_places(model)):
            inside = _ranged(part, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, inside))
        for mixer in (module for module in model.modules() if isinstance(module, SSMMixer)):
            convolutions = {name: _ranged("conv", getattr(mixer.ops, name)) for name in _CONVOLUTIONS}
            stack.enter_context(mock.patch.object(mixer, "ops", replace(mixer.ops, **convolutions)))
        yield


_CONVOLUTIONS = ("causal_conv1d_varlen", "causal_conv1d_step")


def seconds_by_part(model: nn.Module, run: Callable[[], object], device: torch.device, passes: int) -> dict[str, float]:
    """Seconds of one `run`, a forward pass of `model`, by part; the mean of `passes`, after one that is not counted."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with ranges(model), tempfile.TemporaryDirectory() as folder:
        run()
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(passes):
                run()
            if on_gpu:
                torch.cuda.synchronize()
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    return {part: microseconds * 1e-6 / passes for part, microseconds in by_part(events, on_gpu).items()}


def by_part(events: list[Mapping[str, Any]], on_gpu: bool) -> dict[str, float]:
    """Microseconds by part in the events of a trace, whose launches and ranges are one thread's."""
    complete = [event for event in events if event.get("ph") == "X"]
    marks = [e for e in complete if e.get("cat") == "user_annotation" and e["name"].startswith(_PREFIX)]
    found: dict[str, float] = defaultdict(float)
    if not on_gpu:
        for mark, parent in _with_ranges(marks, []):
            found[_part(mark)] += mark["dur"]
            if parent:
                found[_part(parent)] -= mark["dur"]
        return dict(found)
    kernels: dict[int | None, list] = defaultdict(list)
    for event in complete:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[_correlation(event)].append(event)
    launches = [
        event
        for event in complete
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and _correlation(event) in kernels
    ]
    for launch, mark in _with_ranges(marks, launches):
        for kernel in kernels.pop(_correlation(launch), []):
            found[REDUCTIONS if "nccl" in kernel["name"].lower() else _part(mark)] += kernel["dur"]
    found[OUTSIDE] += sum(kernel["dur"] for rest in kernels.values() for kernel in rest)
    return dict(found)


def _correlation(event: Mapping[str, Any]) -> int | None:
    """The number that a kernel and its launch share."""
    return event.get("args", {}).get("correlation")


def _part(mark: Mapping[str, Any] | None) -> str:
    return mark["name"].removeprefix(_PREFIX) if mark else OUTSIDE


def _with_ranges(
    marks: list[Mapping[str, Any]], events: list[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """Each mark, or each event where there are some, with the innermost mark around its beginning."""
    order = [(mark["ts"], -mark["dur"], True, mark) for mark in marks]
    points = [(event["ts"], 0, False, event) for event in events]
    around: list[Mapping[str, Any]] = []
    for at, _, is_mark, event in sorted(order + points, key=lambda entry: entry[:2]):
        while around and around[-1]["ts"] + around[-1]["dur"] <= at:
            around.pop()
        if not (is_mark and events):
            yield event, around[-1] if around else None
        if is_mark:
            around.append(event)
