"""The oracle of the gated scan: Eq. 2 as written, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pha.ops.precision import accumulation_type


def gated_scan_naive(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the equation after the other; see `pha.ops.gated_scan`."""
    dtype = accumulation_type(value)
    u = b.to(dtype) * gate.to(dtype).sigmoid() * value.to(dtype)
    h = u.new_zeros(u.shape[0], u.shape[2]) if h0 is None else h0.to(dtype)
    states = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None], 0.0, h)
        h = a.to(dtype) * h + u[:, t]
        states.append(h)
    return torch.stack(states, dim=1).to(value.dtype), h
