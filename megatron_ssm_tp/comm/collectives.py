"""The backend "collective": quantized all-reduces out of the collectives that every process group has (gloo, NCCL).

p ranks, a tensor of B bytes of codes and scales. Two ways, chosen by bytes:

    one-shot  all-gather of all codes; each rank decodes and sums all p             (p - 1) B received, one rounding
    two-shot  all-to-all of parts; each rank decodes, sums and encodes its part;
              all-gather of the sums' codes                               2 (p - 1) / p B received, two roundings

At p = 2 both receive the same, so one-shot; beyond, one-shot spares a collective and pays (p - 1)(p - 2) / p B for it.

Either way every rank ends with the same bits: what is decoded was encoded by one rank for all, its own tensor included,
and contributions are summed in float32 in the order of ranks. It takes ranks that run the same code: all on GPUs of
one kind, or all on CPUs.
"""

import torch
import torch.distributed as dist

from .payload import Layout
from .quantize import decode_sum, encode, sum_and_encode
from .recipes import AllReduceRecipe

ONE_SHOT_EXTRA_BYTES = 1 << 18  # what a collective's launch is worth: some 10 us at 25 GB/s


def all_reduce(
    x: torch.Tensor,
    group: dist.ProcessGroup,
    recipe: AllReduceRecipe,
    *,
    exact_columns: int = 0,
    one_shot_extra_bytes: int = ONE_SHOT_EXTRA_BYTES,
) -> torch.Tensor:
    """The sum of x over the group's ranks, quantized on the wire.

    Args:
        x: [.., h], bfloat16, float16 or float32, any strides; the same shape and dtype on every rank. Not changed.
        group: this rank's process group.
        recipe: the format; all ranks must give the same one.
        exact_columns: this many last columns of x travel as they are, beside the codes, and are summed in float32.
        one_shot_extra_bytes: one-shot is used while it receives no more bytes than this beyond what two-shot does.

    Returns:
        A new contiguous tensor of x's shape and dtype, the same bits on every rank.

    Raises:
        UserError: the dtype, the group or exact_columns is not legal.
    """
    recipe.check(x, group, exact_columns)
    p = group.size()
    if p == 1 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = x.shape[-1] if x.dim() else 1
    x, rows_out = x.reshape(-1, columns), out.view(-1, columns)
    code_bytes = recipe.bytes_of(x.shape[0] * (columns - exact_columns))
    if code_bytes * (p - 1) * (p - 2) // p > one_shot_extra_bytes:
        _two_shot(x, exact_columns, group, recipe, rows_out)
    else:
        _one_shot(x, exact_columns, group, recipe, rows_out)
    return out


def _cut(x: torch.Tensor, exact_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [rows, columns]: what is quantized, and what is not."""
    return (x[:, :-exact_columns], x[:, -exact_columns:]) if exact_columns else (x, x[:0])


def _one_shot(
    x: torch.Tensor, exact_columns: int, group: dist.ProcessGroup, recipe: AllReduceRecipe, out: torch.Tensor
) -> None:
    """Fills `out` [rows, columns]."""
    values, exact = _cut(x, exact_columns)
    layout = Layout(recipe, values.numel(), 1, exact.numel() * exact.element_size())
    payload = encode(values, layout)
    if exact_columns:
        layout.exact(payload, exact.dtype).copy_(exact.reshape(1, -1))
    gathered = payload.new_empty(group.size(), layout.part_bytes)
    dist.all_gather_into_tensor(gathered, payload, group=group)
    values, exact = _cut(out, exact_columns)
    decode_sum(gathered.unsqueeze(1), layout, values)
    if exact_columns:
        exact.copy_(_sum_exact(layout.exact(gathered, exact.dtype)).view(exact.shape))


def _two_shot(
    x: torch.Tensor, exact_columns: int, group: dist.ProcessGroup, recipe: AllReduceRecipe, out: torch.Tensor
) -> None:
    """Fills `out` [rows, columns]."""
    p, (values, exact) = group.size(), _cut(x, exact_columns)
    exact_a_part = -(-exact.numel() // p)
    layout = Layout(recipe, values.numel(), p, exact_a_part * exact.element_size())
    payload = encode(values, layout)
    if exact_columns:
        padded = torch.cat([exact.reshape(-1), exact.new_zeros(p * exact_a_part - exact.numel())])
        layout.exact(payload, exact.dtype).copy_(padded.view(p, -1))
    received = torch.empty_like(payload)
    dist.all_to_all_single(received, payload, group=group)
    summed = sum_and_encode(received.unsqueeze(1), layout.one_part())
    if exact_columns:
        sums = _sum_exact(layout.exact(received, exact.dtype))
        layout.exact(summed, exact.dtype).copy_(sums.unsqueeze(0))
    gathered = torch.empty_like(payload)
    dist.all_gather_into_tensor(gathered, summed, group=group)
    values, exact = _cut(out, exact_columns)
    decode_sum(gathered.unsqueeze(0), layout, values)
    if exact_columns:
        exact.copy_(layout.exact(gathered, exact.dtype).flatten()[: exact.numel()].view(exact.shape))


def _sum_exact(contributions: torch.Tensor) -> torch.Tensor:
    """[p, n] -> [n]: summed in float32 in rank order."""
    total = contributions[0].float()
    for contribution in contributions[1:]:
        total = total + contribution.float()
    return total.to(contributions.dtype)
