"""How fast a device's memory is, as the floors of what is bound by it assume."""

import torch
from measure import seconds

_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}  # beyond any cache


def copy_speed(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, both counted: a median, of the rank where it is slowest."""
    source = torch.ones(_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)
