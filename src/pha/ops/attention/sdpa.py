"""PyTorch's scaled_dot_product_attention, in blocks of queries where there is a window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.attention.naive import Mask, within, written_out

WINDOW_BLOCK = 256  # queries at a time under a window: each block reads this many keys too many


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, window: int | None = None
) -> Tensor:
    """PyTorch's scaled_dot_product_attention, any head size, key heads shared without copies."""
    queries, keys, mask = q.shape[2], k.shape[2], written_out(mask)
    if window is not None and keys > window:
        return _windowed_sdpa(q, k, v, mask, window)
    # One new token sees every cached one, so causality needs no mask there.
    causal = bool(mask is None and queries == keys and queries > 1)  # also where they are traced
    if mask is None and not causal and queries > 1:
        mask = within(queries, keys, keys, q.device)
    return _sdpa(q, k, v, mask, causal)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    shared = bool(q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=1.0, enable_gqa=shared
    )


def _windowed_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """Blocks of queries, each against the stretch of keys that its window reaches."""
    queries, keys = q.shape[2], k.shape[2]
    past = keys - queries
    bands: dict[tuple[int, int], Tensor] = {}
    outputs = []
    for begin in range(0, queries, WINDOW_BLOCK):
        end = min(begin + WINDOW_BLOCK, queries)
        low, high = max(0, past + begin - window + 1), past + end
        shape = (end - begin, high - low)
        if shape not in bands:  # all blocks but the first and last few have the same
            bands[shape] = within(*shape, window, q.device)
        allowed = bands[shape]
        if mask is not None:
            allowed = allowed & mask[:, :, begin:end, low:high]
        outputs.append(
            _sdpa(q[:, :, begin:end], k[:, :, low:high], v[:, :, low:high], allowed, False)
        )
    return torch.cat(outputs, dim=2)
