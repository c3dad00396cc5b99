"""The gated scan in torch's own operations, with the backward pass in closed form."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pha.ops.precision import accumulation_type


def torch_forward(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h and the last state, blocks of time side by side. See `gated_scan`."""
    dtype = accumulation_type(value)
    if not value.numel():
        last = value.new_zeros(value.shape[0], value.shape[2], dtype=dtype)
        return torch.empty_like(value), last if h0 is None else last.copy_(h0)
    h = gate.to(dtype).sigmoid().mul_(value).mul_(b.to(dtype))
    decay, kept = a.to(dtype), None if starts is None else (~starts).to(dtype)
    if h0 is not None:
        first = decay * h0
        h[:, 0] += first if kept is None else first * kept[:, :1]
    _recur_(h, decay, kept)
    last = h[:, -1].clone()
    return h.to(value.dtype), last


def torch_backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dgate, dvalue, da, db and dh0 (that of zeros without h0), in torch's own operations."""
    dtype = accumulation_type(h)
    state = dtype if h0 is None else h0.dtype
    if not h.numel():
        dgate, dvalue, da, db = (x.new_zeros(x.shape) for x in (gate, value, a, b))
        return dgate, dvalue, da, db, dh_last.to(state, copy=True)
    decay, scale = a.to(dtype), b.to(dtype)
    g = dh.to(dtype, copy=True, memory_format=torch.contiguous_format)
    g[:, -1] += dh_last
    kept = None if starts is None else (~starts).to(dtype)
    _recur_(g, decay, kept, back=True)
    into = g if kept is None else g * kept.unsqueeze(-1)  # what reaches the state before
    da = (into[:, 1:] * h[:, :-1]).sum((0, 1))
    if h0 is not None:
        da += (into[:, 0] * h0).sum(0)
    dh0 = (into[:, 0] * decay).to(state)
    s = gate.to(dtype).sigmoid()
    g.mul_(s)
    dvalue = g * scale
    dgate = (dvalue * value).mul_(1 - s)
    db = g.mul_(value).sum((0, 1))
    return dgate.to(gate.dtype), dvalue.to(value.dtype), da.to(a.dtype), db.to(b.dtype), dh0


def _recur_(x: Tensor, a: Tensor, kept: Tensor | None, back: bool = False) -> None:
    """x_t += a kept_t x_{t-1} in place; or, back from the end, x_t += a kept_{t+1} x_{t+1}.

    Blocks of time are computed side by side, each as if nothing came before it; then what does is
    added, block after block. That takes about 2 sqrt(T) operations on large tensors, not T on small
    ones.

    Args:
        x: (B, T, n).
        a: (n,).
        kept: (B, T), 0 where nothing comes in from the step before, else 1; None for ones.
        back: the direction.
    """
    T = x.shape[1]
    size = math.isqrt(T)
    rest = T % size
    direction = slice(None, None, -1 if back else 1)
    if kept is not None and back:
        kept = kept.roll(-1, 1)  # the first is not looked at

    def cut(whole: Tensor) -> Tensor:
        return (whole[:, rest:] if back else whole[:, : T - rest]).unflatten(1, (-1, size))

    def add(to: Tensor, carried: Tensor, links: Tensor | None, decay: Tensor) -> None:
        to.addcmul_(carried if links is None else carried * links.unsqueeze(-1), decay)

    blocks, links = cut(x), None if kept is None else cut(kept)
    order = range(size)[direction]
    for before, now in itertools.pairwise(order):
        add(blocks[:, :, now], blocks[:, :, before], None if links is None else links[:, :, now], a)
    exponents = torch.arange(1, size + 1, device=a.device, dtype=a.dtype)
    powers = a ** (exponents.flip(0) if back else exponents)[:, None]
    if links is not None:
        links = links.flip(2).cumprod(2).flip(2) if back else links.cumprod(2)
    for before, now in itertools.pairwise(range(blocks.shape[1])[direction]):
        last = blocks[:, before, order[-1], None]
        add(blocks[:, now], last, None if links is None else links[:, now], powers)
    for now in range(rest)[direction] if back else range(T - rest, T):
        before = now + 1 if back else now - 1
        add(x[:, now], x[:, before], None if kept is None else kept[:, now], a)
