"""residual + x and its RMS norm in one pass: what a fused all-reduce is compared with, behind NCCL's.

One Triton program a row, the row in registers: 4 tensors of traffic, as little as the job allows.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton: the reference alone
    triton = None


def reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [rows, h], weight [h] -> (residual + x, its norm): float32 inside, both rounded to x's dtype."""
    total = residual.float() + x.float()
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return total.to(x.dtype), normed.to(x.dtype)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference`, by the kernel on GPUs; x and residual contiguous."""
    if triton is None or not (x.is_cuda or triton.knobs.runtime.interpret):
        return reference(x, residual, weight, eps)
    new_residual, normed = torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    width = triton.next_power_of_2(columns)
    warps = max(1, min(16, width // 512))  # 16 values a thread, loaded 16 bytes at a time
    _add_norm_kernel[(rows,)](x, residual, weight, new_residual, normed, columns, eps, WIDTH=width, num_warps=warps)
    return new_residual, normed


if triton is not None:

    @triton.jit
    def _add_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, normed_ptr, columns, eps, WIDTH: tl.constexpr):
        at = tl.arange(0, WIDTH)
        mask = at < columns
        row = tl.program_id(0).to(tl.int64) * columns
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(x_ptr + row + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(residual_ptr + row + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total, axis=0) / columns + eps)
        tl.store(out_ptr + row + at, total.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(normed_ptr + row + at, (total * scale * weight).to(normed_ptr.dtype.element_ty), mask=mask)
