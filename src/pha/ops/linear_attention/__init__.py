"""Linear attention: a matrix state that decays, adds outer products, and is read by queries.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,   y_t = S_t^T q_t

With `beta` an addition first takes away what the state has for the key (the delta rule):

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - (exp(g_t) S_{t-1})^T k_t)^T

A normaliser is one more column of v, of ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.backends import Op
from pha.ops.linear_attention.chunked import linear_attention_chunked
from pha.ops.linear_attention.naive import linear_attention_naive
from pha.ops.pieces import Pieces
from pha.ops.shapes import require_shapes
from pha.ops.testing import random_numbers, relative_error
from pha.utils.errors import PHAError


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    last_state: bool = True,
    pieces: Pieces | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence over time.

    Args:
        q: (B, T, G, K) queries, any floating type; head h of v reads number h // (H / G).
        k: (B, T, G, K) keys.
        v: (B, T, H, P) values.
        g: logarithms of the decays, finite and at most 0: (B, T, H), or (B, T, H, K) for a decay
            per key channel. Absent, nothing is forgotten.
        beta: (B, T, H) strengths of the delta rule; without them values are added.
        h0: (B, H, K, P) state before the first step; zeros when absent.
        starts: (B, T) bool, true where a document begins: the state is reset before that step.
        mask: (B, T) bool, false where there is no step (padding): the state stays, and y is 0.
        last_state: whether the last state is wanted.
        pieces: where the rest of the sequence is, if these are the steps of one piece of it; then
            there is no beta, no h0, no mask and no last state.

    Returns:
        y (B, T, H, P) in the type of `v`, and the last state (B, H, K, P), or None if not wanted.
        Computed in float32 (float64 for float64 inputs), the type of the last state.

    Raises:
        PHAError: shapes that do not fit each other, or the delta rule in pieces: what it keeps of
            a state is no product of decays.
    """
    (B, T, H, P), (G, K) = v.shape, k.shape[2:]
    decays = (B, T, H) if g is None or g.dim() == 3 else (B, T, H, K)
    require_shapes(
        "linear_attention",
        "k, v",
        {
            **{"q": (q, (B, T, G, K)), "k": (k, (B, T, G, K)), "g": (g, decays)},
            **{"beta": (beta, (B, T, H)), "h0": (h0, (B, H, K, P))},
            **{"starts": (starts, (B, T)), "mask": (mask, (B, T))},
        },
    )
    if H % G:
        raise PHAError(f"linear_attention: {H} heads of v cannot share {G} of q and k equally")
    if mask is not None:
        q, k, v = (torch.where(mask[..., None, None], x, 0) for x in (q, k, v))
        g = None if g is None else torch.where(mask.view(B, T, *[1] * (g.dim() - 2)), g, 0)
    # Calling anything else costs more than one step of the equation.
    run = linear_attention_naive if T == 1 else _OP(v.device.type)
    if pieces is not None and beta is not None:
        raise PHAError("linear_attention: the delta rule needs whole sequences on each rank")
    with torch.autocast(v.device.type, enabled=False):
        y, last = run(q, k, v, g, beta, h0, starts)
        if pieces is not None:
            return y + _from_before(q, g, last, starts, pieces).to(y.dtype), None
    if mask is not None:
        y = torch.where(mask[..., None, None], y, 0)
    return y, last if last_state else None


def _from_before(
    q: Tensor, g: Tensor | None, last: Tensor, starts: Tensor | None, pieces: Pieces
) -> Tensor:
    """What the pieces before add to y: q_t times what is kept of the state that enters this one."""
    (B, T), (H, dtype) = q.shape[:2], (last.shape[1], last.dtype)
    if g is None:
        g = torch.zeros(B, T, H, dtype=dtype, device=q.device)
    g = g if g.dim() == 4 else g.unsqueeze(-1)
    kept = g.to(dtype).sum(1).exp()
    if starts is not None:
        kept = kept * ~starts.any(1)[:, None, None]

    def read(q: Tensor, g: Tensor, state: Tensor) -> Tensor:
        wide = q.to(dtype).repeat_interleave(H // q.shape[2], 2) * g.to(dtype).cumsum(1).exp()
        if starts is not None:
            wide = wide * (starts.cumsum(1) == 0)[..., None, None]
        return torch.einsum("bthk,bhkp->bthp", wide, state)

    return pieces.computed_again(read, q, g, pieces.entering(last, kept.unsqueeze(-1)))


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    B, T, H, K, P = 2, 37, 4, 5, 3
    starts = uniform(B, T) < 0.1
    unit = [F.normalize(normal(B, T, heads, K), dim=-1) for heads in (2, 2, H, H)]
    v, h0 = normal(B, T, H, P), normal(B, H, K, P)
    per_head, per_channel = F.logsigmoid(normal(B, T, H)), F.logsigmoid(normal(B, T, H, K))
    return max(
        relative_error(
            lambda *x: backend(*x[:4], None, x[4], starts),
            lambda *x: oracle(*x[:4], None, x[4], starts),
            *(*unit[:2], v, per_head, h0),
        ),
        relative_error(
            lambda *x: backend(*x, starts),
            lambda *x: oracle(*x, starts),
            *(*unit[2:], v, per_channel, normal(B, T, H).sigmoid(), h0),
        ),
    )


_OP = Op(
    "linear_attention",
    {"naive": linear_attention_naive, "chunked": linear_attention_chunked},
    {"default": "chunked"},
    _check,
    plain="chunked",
    limits={"chunked": "naive for one step"},
)
