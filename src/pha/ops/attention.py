"""Causal grouped-query attention behind one function: PyTorch's fused kernels, or the oracle."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.backends import Op
from pha.ops.testing import relative_error


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T) v, causal; any scaling of the logits is already in q.

    Args:
        q: (B, H, T, K) queries of the last T of S positions.
        k: (B, G, S, K) keys, H a multiple of G; each key head serves H / G query heads.
        v: (B, G, S, K) values.
        mask: (B, 1, T, S) bool from `attention_mask`, true where a query may look; None means
            plain causal attention, the fast path.

    Returns:
        (B, H, T, K) in the type of `v`.
    """
    return _OP(q.device.type)(q, k, v, mask)


def attention_mask(
    queries: int,
    keys: int,
    device: torch.device,
    document_starts: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor | None:
    """Which of `keys` positions each of the last `queries` positions may attend to.

    Args:
        queries: T, the number of new tokens.
        keys: S >= T, the number of cached and new tokens.
        device: where the mask lives.
        document_starts: (B, S) bool, true where a document begins; attention stays within it.
        token_mask: (B, S) bool, false at padding, which nobody attends to. A padding position
            may still attend to itself, since a softmax over nothing is not a number.

    Returns:
        (B or 1, 1, T, S) bool, or None when plain causal attention says the same.
    """
    if document_starts is None and token_mask is None and (queries == keys or queries == 1):
        return None
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    mask = (key <= query)[None]
    if document_starts is not None:
        document = document_starts.cumsum(-1)
        mask = mask & (document[:, keys - queries :, None] == document[:, None, :])
    if token_mask is not None:
        mask = mask & (token_mask[:, None, :] | (key == query)[None])
    return mask[:, None]


def attention_naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The oracle: the T x S matrix written out."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    logits = (q @ k.transpose(-1, -2)).masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ v


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention, any head size, key heads shared without copies."""
    # One new token sees every cached one, so causality needs no mask there.
    causal = mask is None and q.shape[2] == k.shape[2] and q.shape[2] > 1
    if mask is None and not causal and q.shape[2] > 1:
        mask = attention_mask(q.shape[2], k.shape[2], q.device)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=1.0, enable_gqa=q.shape[1] != k.shape[1]
    )


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 37, 20), (2, 2, 37, 20), (2, 2, 37, 20))
    q, k, v = (torch.randn(*s, generator=generator).to(device_type) for s in shapes)
    starts = (torch.rand(2, 37, generator=generator) < 0.1).to(device_type)
    mask = attention_mask(37, 37, q.device, starts)
    plain = relative_error(backend, oracle, q, k, v)
    return max(
        plain, relative_error(lambda *x: backend(*x, mask), lambda *x: oracle(*x, mask), q, k, v)
    )


_OP = Op(
    "attention", {"naive": attention_naive, "sdpa": attention_sdpa}, {"default": "sdpa"}, _check
)
