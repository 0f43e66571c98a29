"""Between the host's memory and the device's, neither waiting for the other."""

from collections.abc import Sequence

import torch


def to_device(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64."""
    host = torch.tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """There once the device has come so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
