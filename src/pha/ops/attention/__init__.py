"""Causal grouped-query attention behind one function: PyTorch's kernels, or the oracle."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask

from pha.ops.attention.flex import BLOCK, TRIAL, block_mask, tried_flex
from pha.ops.attention.naive import Mask, attention_naive, within, written_out
from pha.ops.attention.sdpa import attention_sdpa
from pha.ops.backends import Op
from pha.ops.testing import random_numbers, relative_error

ON_A_GPU = ("flex", "flash", "cudnn")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    window: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T) v, causal; any scaling of the logits is already in q.

    Args:
        q: (B, H, T, K) queries of the last T of S positions.
        k: (B, G, S, K) keys, H a multiple of G; each key head serves H / G query heads.
        v: (B, G, S, K) values.
        mask: (B or 1, 1, T, S) bool from `attention_mask`, true where a query may look, or the
            blocks of `block_mask` for FlexAttention; None means plain causal attention, the fast
            path.
        window: how many keys a query may see, its own included; None means all. Work and memory
            are then linear in T. What blocks say includes it.
        backend: a name in the op table; None for the one of the device.

    Returns:
        (B, H, T, K) in the type of `v`.
    """
    function = _OP(q.device.type) if backend is None else _OP.backends[backend]
    return function(q, k, v, mask, window)


def takes_blocks(backend: str | None, queries: int, device_type: str) -> bool:
    """Whether the backend, or the one of the device, wants masks of so many queries as blocks."""
    return (backend or _OP.choice(device_type)) in ON_A_GPU and queries >= BLOCK


def causal_pairs(length: int, window: int) -> int:
    """How many (query, key) pairs there are among `length` tokens that see at most `window`."""
    return window * (window + 1) // 2 + (length - window) * window


def keys_seen(
    queries: int, keys: int, mask: Mask | None, window: int | None, device: torch.device
) -> Tensor:
    """How many keys each of the last T of S positions sees, (1, 1, T, 1) or (B, 1, T, 1).

    `mask` and `window` are those of `attention`.
    """
    mask = written_out(mask)
    if mask is None:
        n = torch.arange(keys - queries + 1, keys + 1, device=device)
        return (n if window is None else n.clamp(max=window)).view(1, 1, -1, 1)
    if window is not None:
        mask = mask & within(queries, keys, window, device)
    return mask.sum(-1, keepdim=True)


def attention_mask(
    query: Tensor,
    key: Tensor,
    document_starts: Tensor | None = None,
    token_mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Which keys each query may attend to, causally.

    Args:
        query: (T,) positions of the new tokens.
        key: (S,) positions of cached and new keys; below zero where a place is not filled.
        document_starts: (B, N) bool over positions 0 .. N - 1, true where a document begins;
            attention stays within it.
        token_mask: (B, N) bool over the same, false at padding, which nobody attends to. A padding
            position may still attend to itself, since a softmax over nothing is not a number.
        window: how many keys a query may see, its own included.

    Returns:
        (B or 1, 1, T, S) bool.
    """
    q, k = query[:, None], key[None, :]
    mask = (k <= q) & (k >= 0)
    if window is not None:
        mask = mask & (k > q - window)
    mask = mask[None]
    if document_starts is not None:
        document = document_starts.cumsum(-1)
        known = key.clamp(0, document.shape[1] - 1)
        mask = mask & (document[:, query, None] == document[:, None, known])
    if token_mask is not None:
        known = key.clamp(0, token_mask.shape[1] - 1)
        mask = mask & (token_mask[:, None, known] | (k == q)[None])
    return mask[:, None]


def attention_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    window: int | None = None,
    *,
    kernels: Sequence[SDPBackend] | None = None,
) -> Tensor:
    """FlexAttention for blocks, and for windows and cached keys without a mask, else SDPA.

    There `kernels` are tried for half precision without a mask, in their order.
    """
    T, S = q.shape[2], k.shape[2]
    bounded = S != T or (window is not None and window < S)
    if mask is None and bounded and T >= BLOCK:
        key = torch.arange(S, device=q.device)
        mask = block_mask(key[S - T :], key, window=window)
    if isinstance(mask, BlockMask):
        return tried_flex(q, k, v, mask)
    return attention_sdpa(q, k, v, mask, window, kernels=kernels)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    T = 150
    shapes = ((2, 6, T, 20), (2, 2, T, 20), (2, 2, T, 20))
    q, k, v = (normal(*s) for s in shapes)
    starts = uniform(2, T) < 0.1
    places = torch.arange(T, device=q.device)
    mask, blocks = (make(places, places, starts) for make in (attention_mask, block_mask))
    return max(
        relative_error(
            lambda *x, o=options: backend(*x, *o), lambda *x, o=options: oracle(*x, *o), q, k, v
        )
        for options in ((), (mask,), (None, 11), (mask, 11), (blocks,))
    )


_OP = Op(
    "attention",
    {
        "naive": attention_naive,
        "sdpa": attention_sdpa,
        "flex": attention_flex,
        "flash": functools.partial(attention_flex, kernels=[SDPBackend.FLASH_ATTENTION]),
        "cudnn": functools.partial(attention_flex, kernels=[SDPBackend.CUDNN_ATTENTION]),
    },
    {"cuda": "flex", "default": "sdpa"},
    _check,
    only_on=dict.fromkeys(ON_A_GPU, "cuda"),
    plain="sdpa",
    limits={
        "flex": "where a query sees all before it, flash attention in training and cuDNN's kernel "
        "in inference; in float32, and with a mask below 128 tokens, the memory-efficient one",
        "flash": "flash attention where flex would have the choice",
        "cudnn": "cuDNN's kernel where flex would have the choice",
    },
    trials={"flex": TRIAL},
)
