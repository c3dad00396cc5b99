"""The linear recurrence of all scans, in torch's own operations."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def recur_(x: Tensor, a: Tensor, kept: Tensor | None = None, back: bool = False) -> None:
    """x_t += a_t kept_t x_{t-1} in place; or, back from the end, x_t += a_{t+1} kept_{t+1} x_{t+1}.

    Blocks of time are computed side by side, each as if nothing came before it; then what does is
    added, block after block. That takes about 2 sqrt(T) operations on large tensors, not T on small
    ones.

    Args:
        x: (B, T, n), or (B, T, ...) without `kept`.
        a: of the shape of x, or (n,), the same at every step.
        kept: (B, T), 0 where nothing comes in from the step before, else 1; None for ones.
        back: the direction.
    """
    T = x.shape[1]
    size = math.isqrt(T)
    rest = T % size
    direction = slice(None, None, -1 if back else 1)
    each = a.expand(1, T, -1) if a.dim() == 1 else a
    if back:  # the first of either is not looked at
        each = each if a.dim() == 1 else each.roll(-1, 1)
        kept = None if kept is None else kept.roll(-1, 1)

    def cut(whole: Tensor) -> Tensor:
        return (whole[:, rest:] if back else whole[:, : T - rest]).unflatten(1, (-1, size))

    def add(to: Tensor, carried: Tensor, links: Tensor | None, decay: Tensor) -> None:
        to.addcmul_(carried if links is None else carried * links.unsqueeze(-1), decay)

    blocks, decays, links = cut(x), cut(each), None if kept is None else cut(kept)
    order = range(size)[direction]
    for before, now in itertools.pairwise(order):
        link = None if links is None else links[:, :, now]
        add(blocks[:, :, now], blocks[:, :, before], link, decays[:, :, now])
    if a.dim() == 1:
        exponents = torch.arange(1, size + 1, device=a.device, dtype=a.dtype)
        exponents = exponents.flip(0) if back else exponents
        decays = (a ** exponents[:, None]).expand(1, blocks.shape[1], -1, -1)
    else:
        decays = _products(decays, back)
    links = None if links is None else _products(links, back)
    for before, now in itertools.pairwise(range(blocks.shape[1])[direction]):
        last = blocks[:, before, order[-1], None]
        add(blocks[:, now], last, None if links is None else links[:, now], decays[:, now])
    for now in range(rest)[direction] if back else range(T - rest, T):
        before = now + 1 if back else now - 1
        add(x[:, now], x[:, before], None if kept is None else kept[:, now], each[:, now])


def _products(x: Tensor, back: bool) -> Tensor:
    """Products of all up to each step of a block, which lie along dimension 2."""
    return x.flip(2).cumprod(2).flip(2) if back else x.cumprod(2)
