"""The oracle of linear attention: the recurrence as written, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pha.ops.precision import accumulation_type


def linear_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the equation after the other; see `pha.ops.linear_attention`."""
    dtype, (B, T, H, P) = accumulation_type(v), v.shape
    q, k = (x.to(dtype).repeat_interleave(H // x.shape[2], 2).unsqueeze(-1) for x in (q, k))
    decay = None
    if g is not None:
        decay = (g if g.dim() == 4 else g.unsqueeze(-1)).to(dtype).exp().unsqueeze(-1)
    S = q.new_zeros(B, H, k.shape[3], P) if h0 is None else h0.to(dtype)
    outputs = []
    for t in range(T):
        if starts is not None:
            S = torch.where(starts[:, t, None, None, None], 0.0, S)
        if decay is not None:
            S = decay[:, t] * S
        u = v[:, t].to(dtype)
        if beta is not None:
            u = beta[:, t, :, None].to(dtype) * (u - (S * k[:, t]).sum(2))
        S = S + k[:, t] * u.unsqueeze(2)
        outputs.append((S * q[:, t]).sum(2))
    y = torch.stack(outputs, 1) if outputs else v
    return y.to(v.dtype), S
