"""Linear attention in chunks of time, by matrix products: linear cost and memory in length.

With G the sum of g since the chunk began and S the state before it, a chunk gives

    y_t = sum_{s <= t} (q_t . exp(G_t - G_s) k_s) u_s + S^T exp(G_t) q_t
    S  <- exp(G_C) S + sum_s exp(G_C - G_s) k_s u_s^T

where u is v or, with the delta rule, the solution of the unit triangular system

    u_t + beta_t sum_{s < t} (k_t . exp(G_t - G_s) k_s) u_s = beta_t (v_t - S^T exp(G_t) k_t).

Both terms of its right side are solved for all chunks at once; only S goes from chunk to chunk.
Every exponent is a difference, never above 0, taken in float64 before it is raised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.linear_attention.naive import linear_attention_naive
from pha.ops.precision import accumulation_type, exponent_type

# Powers of two. Where heads are small, the weights of the pairs in a chunk cost more than their
# products on a CPU, and a shorter chunk has fewer.
CHUNK, SMALL_CHUNK, SMALL = 64, 32, 64


def linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Matrix products within chunks of time; see `pha.ops.linear_attention`."""
    (B, T, H, P), K = v.shape, k.shape[3]
    if T <= 1:
        return linear_attention_naive(q, k, v, g, beta, h0, starts)
    dtype, C = accumulation_type(v), min(chunk_length(K), 1 << (T - 1).bit_length())
    q, k, u = (_chunks(x.to(dtype), C) for x in (q, k, v))
    G = _chunks(q.new_zeros(B, T, 1) if g is None else g.to(exponent_type(g.device)), C).cumsum(3)
    by_channel = G.dim() == 5
    document = _chunks(starts[..., None], C).cumsum(-1) if starts is not None else G.new_zeros(C)
    seen = (document[..., None] == document[..., None, :]).tril()
    if by_channel:
        q, k = _heads(q, H), _heads(k, H)
        products = [
            torch.where(seen, _products_by_channel(x, k, G), 0)
            for x in ((q,) if beta is None else (q, k))
        ]
    else:
        G = G[..., None]
        D = (G - G.mT).to(dtype).masked_fill_(~seen, -torch.inf).exp_()
        D = D.expand(-1, -1, H, -1, -1).unflatten(2, (k.shape[2], -1))
        products = [
            ((x @ k.mT).unsqueeze(3) * D).flatten(2, 3) for x in ((q,) if beta is None else (q, k))
        ]
    since = G.to(dtype).exp() * (document == 0)[..., None]
    until = (G[..., -1:, :] - G).to(dtype).exp() * seen[..., -1, :, None]
    # One decay for all channels scales what is read and written, which is smaller than q and k.
    keys, rows = k, [since, until]
    if by_channel:
        q, k, rows = q * since, k * until, []
    parts = [products[0], u, q, k, since[..., -1, :, None], *rows]
    if beta is not None:
        strength = _chunks(beta.to(dtype), C)[..., None]
        right = strength * torch.cat([u, _heads(keys, H) * since], -1)
        system = strength * products[1]
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        parts[1], W = solved.split([P, K], -1)
        parts.append(W)
    S = q.new_zeros(B, H, K, P) if h0 is None else h0.to(dtype)
    outputs = []
    # Unbound all at once, for the gradient of x[c] would be as large as x.
    for A, u, q, k, kept, *others in zip(*(x.unbind() for x in parts), strict=True):
        if beta is not None:
            u = u - others.pop() @ S
        read = _shared_product(q, S)
        outputs.append(A @ u + (others[0] * read if others else read))
        S = kept * S + _shared_product(k.mT, others[1] * u if others else u)
    y = torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)[:, :T]
    return y.to(v.dtype).contiguous(), S


def chunk_length(K: int) -> int:
    """Tokens of a chunk for heads of K channels of q and k."""
    return SMALL_CHUNK if K < SMALL else CHUNK


def chunked_flops(heads: int, sharers: int, K: int, P: int, length: int, delta: bool) -> float:
    """FLOPs a token of these products over the pairs within chunks, and of those with the state.

    Queries and keys are those of `sharers` heads; the delta rule has its system besides.
    """
    pairs = min(chunk_length(K), length) + 1  # 2 FLOPs for each, of which half are seen
    additive = sharers * pairs * K + heads * (pairs * P + 4 * K * P)
    return float(additive + delta * heads * (2 * pairs * K + pairs * P + 2 * K * P))


def _chunks(x: Tensor, C: int) -> Tensor:
    """(B, T, H, ...) as (T / C, B, H, C, ...), with zeros at the end."""
    x = F.pad(x, (*[0, 0] * (x.dim() - 2), 0, -x.shape[1] % C))
    return x.unflatten(1, (-1, C)).movedim(1, 0).transpose(2, 3)


def _heads(x: Tensor, H: int) -> Tensor:
    """(n, B, G, ...) for H heads, which share G."""
    return x.unsqueeze(3).expand(-1, -1, -1, H // x.shape[2], -1, -1).flatten(2, 3)


def _shared_product(x: Tensor, y: Tensor) -> Tensor:
    """x (B, G, M, N) times y (B, H, N, P), (B, H, M, P), where H / G heads share an x."""
    if x.shape[1] == y.shape[1]:
        return x @ y
    y = y.unflatten(1, (x.shape[1], -1)).transpose(2, 3)  # (B, G, N, H / G, P)
    return (x @ y.flatten(3)).unflatten(3, y.shape[3:]).transpose(2, 3).flatten(1, 2)


def _products_by_channel(x: Tensor, k: Tensor, G: Tensor) -> Tensor:
    """sum_K x_t exp(G_t - G_s) k_s for s <= t, (..., C, C), from (..., C, K).

    Of two neighbouring blocks of time, the later sees the earlier through the last step of the
    earlier one: the exponents on both sides are at most 0. Blocks double in length until there is
    one.
    """
    A = (x * k).sum(-1)[..., None, None]
    while A.shape[-1] < x.shape[-2]:
        size = A.shape[-1]
        first, second = A.unflatten(-3, (-1, 2)).unbind(-3)
        before, after = G.unflatten(-2, (-1, 2, size)).unbind(-3)
        middle = before[..., -1:, :]
        x_after = x.unflatten(-2, (-1, 2, size))[..., 1, :, :]
        k_before = k.unflatten(-2, (-1, 2, size))[..., 0, :, :]
        x_after = x_after * (after - middle).to(x.dtype).exp()
        k_before = k_before * (middle - before).to(x.dtype).exp()
        bottom = torch.cat([x_after @ k_before.mT, second], -1)
        A = torch.cat([F.pad(first, (0, size)), bottom], -2)
    return A.squeeze(-3)
