"""The gated scan in torch's own operations, with the backward pass in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from pha.ops.precision import accumulation_type
from pha.ops.recurrence import recur_


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
    recur_(h, decay, kept)
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
    recur_(g, decay, kept, back=True)
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
