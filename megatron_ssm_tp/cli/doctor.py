"""`doctor`: what is installed, what the machine has, and what is missing."""

import argparse
import platform
from importlib import metadata

from .console import say

# distribution, what it is for, whether the product stops without it
_LIBRARIES = (
    ("torch", "everything", True),
    ("megatron-core", "everything", True),
    ("safetensors", "reading checkpoints", True),
    ("tokenizers", "text prompts", True),
    ("transformers", "tests, and training the demo checkpoints", False),
    ("mamba-ssm", "training the demo checkpoints fast on a GPU", False),
    ("causal-conv1d", "training the demo checkpoints fast on a GPU", False),
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    subparsers.add_parser("doctor", help="versions, kernels and GPUs found, and what is missing").set_defaults(run=run)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def run(args: argparse.Namespace) -> None:
    say(f"megatron_ssm_tp {_version('megatron_ssm_tp')}, Python {platform.python_version()}, {platform.platform()}")
    say("\nlibraries")
    missing = []
    for name, purpose, required in _LIBRARIES:
        version = _version(name)
        if version is None and required:
            missing.append((name, purpose))
        say(f"  {name:20} {version or 'not found':14} {purpose}")
    _kernels()
    _devices()
    say("\nmissing")
    for name, purpose in missing:
        say(f"  {name}: without it no {purpose}")
    if not missing:
        say("  nothing that today's features need")


def _kernels() -> None:
    say("\nkernels in use")
    if _version("torch") is None:
        say("  unknown without torch")
        return
    from ..ops.choose import implementation

    found = implementation()
    say(f"  convolution, scans and steps of Mamba-1 and Mamba-2: {found.name} ({found.reason})")
    mamba1 = "by the same" if found.name == "triton" else "by the reference"
    say(f"  in training: Mamba-1's {mamba1}, Mamba-2's by the reference (torch)")


def _devices() -> None:
    say("\ndevices")
    if _version("torch") is None:
        say("  unknown without torch")
        return
    import torch
    import torch.distributed as dist

    found = [name for name, there in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there]
    if not torch.cuda.is_available():
        say(f"  no CUDA device: tensor parallelism runs on the CPU over gloo (torch has {', '.join(found)})")
        return
    count = torch.cuda.device_count()
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        links = [str(peer) for peer in range(count) if peer != index and torch.cuda.can_device_access_peer(index, peer)]
        reach = f"peer access to {', '.join(links)}" if links else "no peer access"
        memory = device.total_memory / 2**30
        say(f"  cuda:{index}  {device.name}, {memory:.0f} GiB, sm_{device.major}{device.minor}, {reach}")
    say(f"  CUDA {torch.version.cuda}, collectives: {', '.join(found)}")
