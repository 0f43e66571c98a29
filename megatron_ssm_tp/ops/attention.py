"""Causal attention in torch alone: dense, and over a paged cache of keys and values.

The paged form takes what there is: flash-attn if it is installed, torch's own variable-length kernel on GPUs in half
precision, else blocks of softmax. None loops over requests.
"""

import importlib.util
import itertools
from functools import cache

import torch
import torch.nn.functional as F

SCORES = 1 << 27  # scores held at once by the softmax over blocks: half a GiB in float32
FLASH_HEAD_DIM = 256


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, offset: int = 0, dropout: float = 0.0
) -> torch.Tensor:
    """Query i attends to keys 0 .. offset + i: q [b, l, H, d], k and v [b, L, Hkv, d] -> [b, l, H, d]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None
    if offset:
        rows = torch.arange(q.shape[2], device=q.device)[:, None] + offset
        mask = rows >= torch.arange(k.shape[2], device=q.device)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=True)
    return y.transpose(1, 2)


@cache
def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _fits_flash(q: torch.Tensor) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and half and q.shape[-1] <= FLASH_HEAD_DIM and q.shape[-1] % 8 == 0


def implementation(q: torch.Tensor, page: int) -> str:
    """Which of the three serves queries like q over pages of `page` tokens: "flash-attn", "torch varlen", "softmax"."""
    if _fits_flash(q) and page % 256 == 0 and _installed("flash_attn"):
        return "flash-attn"
    if _fits_flash(q) and _installed("torch.nn.attention.varlen"):
        return "torch varlen"
    return "softmax"


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: torch.Tensor,
    longest: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """Each request's queries attend to its keys up to their own positions, the last query to all of them.

    Args:
        q: [T, H, d], the new tokens of n requests, end to end.
        k_pages, v_pages: [pages, tokens a page, Hkv, d]; the new tokens' keys and values are in them already.
        page_table: int [n, m], the pages of each request, in order.
        cu_seqlens: int [n + 1], where each request's queries begin. lengths: int [n], keys of each.
        longest: no less than the most queries and the most keys of a request.

    Returns:
        [T, H, d]
    """
    use = implementation(q, k_pages.shape[1])
    if use == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        cu_keys = _cumulated(lengths)
        return flash_attn_varlen_func(
            q, k_pages, v_pages, cu_seqlens, cu_keys, *longest, softmax_scale=scale, causal=True, block_table=page_table
        )
    index = _key_index(page_table, lengths, k_pages.shape[1])
    k, v = (pages.flatten(0, 1)[index] for pages in (k_pages, v_pages))
    if use == "torch varlen":
        from torch.nn.attention.varlen import varlen_attn

        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        causal = (-1, 0)
        return varlen_attn(q, k, v, cu_seqlens, _cumulated(lengths), *longest, scale=scale, window_size=causal)
    return _softmax_attention(q, k, v, cu_seqlens, lengths, scale)


def _cumulated(lengths: torch.Tensor) -> torch.Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _key_index(page_table: torch.Tensor, lengths: torch.Tensor, page: int) -> torch.Tensor:
    """Where all requests' keys lie in the flattened pages, end to end: int64 [sum of lengths]."""
    request = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    position = torch.arange(len(request), device=lengths.device) - _cumulated(lengths)[request]
    return page_table[request, position // page].long() * page + position % page


def _softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """Packed q [T, H, d] over packed keys [S, Hkv, d], in float32, requests of like lengths side by side.

    Within a factor of two in queries and in keys, so that padding at most doubles either: a long prompt beside short
    ones, or beside requests that decode, costs what it would alone.
    """
    starts = zip(cu_seqlens.tolist(), _cumulated(lengths).tolist(), strict=True)
    spans = list(itertools.pairwise(starts))
    alike: dict[tuple[int, int], list] = {}
    for (q0, k0), (q1, k1) in spans:
        alike.setdefault(((q1 - q0).bit_length(), (k1 - k0).bit_length()), []).append((q0, q1, k0, k1))
    y = torch.empty_like(q)
    for group in alike.values():
        queries, own = _rows([(q0, q1) for q0, q1, _, _ in group], q.device)
        keys, real = _rows([(k0, k1) for _, _, k0, k1 in group], q.device)
        y[queries[own]] = _padded_attention(q[queries], k[keys], v[keys], own.sum(1), real.sum(1), scale)[own]
    return y


def _rows(spans: list[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [n, longest] of each span, some other's where it is over, and which are its own (bool)."""
    starts = torch.tensor([start for start, _ in spans], device=device)
    lengths = torch.tensor([stop - start for start, stop in spans], device=device)
    steps = torch.arange(max(stop - start for start, stop in spans), device=device)
    own = steps < lengths[:, None]
    return torch.where(own, starts[:, None] + steps, starts[:, None]), own


def _padded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [n, l, H, d] over k, v [n, L, Hkv, d], of which `counts` and `lengths` [n] are real; some queries at a time."""
    k, v = k.float(), v.float()
    before = (lengths - counts)[:, None]  # keys before the first query
    block = max(1, SCORES // (k.shape[0] * k.shape[1] * q.shape[2]))
    y = torch.empty_like(q)
    for start in range(0, q.shape[1], block):
        part = q[:, start : start + block].float().unflatten(2, (k.shape[2], -1))  # [n, l, Hkv, H / Hkv, d]
        scores = torch.einsum("nlhgd,nmhd->nhglm", part, k) * scale
        row = torch.arange(start, start + part.shape[1], device=q.device)
        # A row of padding sees what the last real one sees: it is dropped, and must not be NaN before.
        last = torch.minimum(before + row, lengths[:, None] - 1)
        seen = torch.arange(k.shape[1], device=q.device) <= last[..., None]
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        y[:, start : start + block] = torch.einsum("nhglm,nmhd->nlhgd", weights, v).flatten(2, 3).to(q.dtype)
    return y
