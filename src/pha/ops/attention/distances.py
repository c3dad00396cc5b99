"""ALiBi (Press et al. 2022, arXiv 2108.12409): logits less a slope times the distance of the key.

The slope times the position of the query is the same for all keys, so softmax leaves it out. What
remains is a product of two numbers, one of the query's head and one of the key: a few more entries
of q and k. So every kernel of attention computes it, keys in a cache know where they were, and
nothing of the size of the logits is made.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.precision import accumulation_type

DIGITS, BASE = 4, 256  # of a position below 2^32, each exact in half precision
# What a digit is worth, in q and in k, for the product of both is beyond float16. So is 2^16, but
# not its product with a slope, which is below 1.
IN_QUERY, IN_KEY = (1, BASE, BASE, BASE**2), (1, 1, BASE, BASE)


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 h / H) for h = 1 .. H; where H is no power of 2, those of the one below and others."""
    below = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    between = [2 ** (-4 * h / below) for h in range(1, 2 * below + 1, 2)]
    return slopes + between[: heads - below]


def query_with_slopes(q: Tensor, slopes: list[float]) -> Tensor:
    """q (B, H, T, K) with the entries that `key_with_positions` asks for, (B, H, T, K + 4)."""
    slope = q.new_tensor(slopes)[:, None, None]  # rounded once, the digits' values not at all
    digits = slope.to(accumulation_type(q)) * torch.tensor(IN_QUERY, device=q.device)
    return torch.cat([q, digits.to(q.dtype).expand(*q.shape[:3], -1)], -1)


def key_with_positions(k: Tensor, positions: Tensor) -> Tensor:
    """k (B, G, T, K) with the digits of its positions (B or 1, T), (B, G, T, K + 4)."""
    digits = torch.stack([positions // BASE**i % BASE * w for i, w in enumerate(IN_KEY)], -1)
    return torch.cat([k, digits.to(k.dtype).unsqueeze(1).expand(*k.shape[:3], -1)], -1)


def value_as_wide(v: Tensor) -> Tensor:
    """v (B, G, S, K) with as many zeros more: kernels want sizes to be the same."""
    return F.pad(v, (0, DIGITS))
