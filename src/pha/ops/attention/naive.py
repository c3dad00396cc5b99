"""The oracle of attention: the T x S matrix written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

Mask = Tensor | BlockMask


def attention_naive(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, window: int | None = None
) -> Tensor:
    """softmax(q k^T) v with every logit at hand; see `pha.ops.attention`."""
    v = v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return attention_weights(q, k, mask, window) @ v


def attention_weights(
    q: Tensor, k: Tensor, mask: Mask | None = None, window: int | None = None
) -> Tensor:
    """softmax(q k^T), (B, H, T, S); see `pha.ops.attention`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    queries, keys = q.shape[2], k.shape[2]
    mask = written_out(mask)
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if window is not None:
        mask = mask & within(queries, keys, window, q.device)
    return (q @ k.transpose(-1, -2)).masked_fill(~mask, -math.inf).softmax(-1)


def written_out(mask: Mask | None) -> Tensor | None:
    """A mask as (B or 1, 1, T, S) bool, whatever form it has."""
    if not isinstance(mask, BlockMask):
        return mask
    B, _, T, S = mask.shape
    row, query, key = (torch.arange(n, device=mask.kv_indices.device) for n in (B, T, S))
    seen: Tensor = mask.mask_mod(row.view(-1, 1, 1, 1), row[:1], query[:, None], key)
    return seen.view(-1, 1, T, S)


def within(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """(T, S) bool: the causal band in which the last T of S positions see `window` keys each."""
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    return (key <= query) & (key > query - window)
