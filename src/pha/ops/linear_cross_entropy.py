"""Output head and cross-entropy in one op that never holds all N x V logits.

For a chunk of rows, z = x W^T, the loss of a row with target y is logsumexp(z) - z_y, and
dz = softmax(z) - onehot(y), dx = dz W, dW = dz^T x. The gradients of a chunk are formed while its
logits are at hand, so the logits are computed once and only dx and dW are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pha.ops.backends import Op
from pha.ops.testing import relative_error

IGNORE_INDEX = -100
# Rows times vocabulary per chunk: about 64 MiB of float32 logits. Smaller chunks spend their time
# adding into dW (V x d), larger ones fall out of the caches.
CHUNK_LOGITS = 1 << 24


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log softmax(x W^T)[target], in nats.

    Matrix products run in the autocast type, softmax and sums in float32 (float64 for float64).

    Args:
        x: (N, d) hidden states.
        weight: (V, d) output head.
        targets: (N,) int64 in [0, V); rows with `IGNORE_INDEX` count for nothing.

    Returns:
        Scalar, float32 or float64. Differentiable once, in x and weight.
    """
    return _OP(x.device.type)(x, weight, targets)


def linear_cross_entropy_naive(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The oracle: all logits, PyTorch's cross-entropy."""
    logits = F.linear(x, weight)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.cross_entropy(
        logits.to(accumulate), targets, reduction="sum", ignore_index=IGNORE_INDEX
    )


def _matmul_type(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _chunk_rows(rows: int, vocabulary: int) -> int:
    return max(1, min(rows, CHUNK_LOGITS // vocabulary))


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        dtype = _matmul_type(x)
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        w = weight.to(dtype)
        chunk = _chunk_rows(x.shape[0], weight.shape[0])
        total = torch.zeros((), dtype=accumulate, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros_like(weight, dtype=accumulate) if need_weight else None
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, x.shape[0], chunk):
                rows = slice(start, start + chunk)
                x_rows, y = x[rows].to(dtype), targets[rows]
                kept = y != IGNORE_INDEX
                y = y.masked_fill(~kept, 0).unsqueeze(1)
                z = (x_rows @ w.T).to(accumulate)
                normaliser = z.logsumexp(-1, keepdim=True)
                total += ((normaliser - z.gather(1, y)).squeeze(1) * kept).sum()
                if dx is None and dw is None:
                    continue
                dz = z.sub_(normaliser).exp_()
                dz.scatter_add_(1, y, dz.new_full(y.shape, -1.0))
                dz = dz.mul_(kept.unsqueeze(1)).to(dtype)
                if dx is not None:
                    dx[rows] = dz @ w
                if dw is not None:
                    # One pass over dW where the types allow it, else the product is added after.
                    if dtype == accumulate:
                        dw.addmm_(dz.T, x_rows)
                    else:
                        dw += dz.T @ x_rows
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        scaled = [None if g is None else g * gradient.to(g.dtype) for g in (dx, dw)]
        return (*scaled, None)


def linear_cross_entropy_chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Chunks of at most `CHUNK_LOGITS` logits. See `linear_cross_entropy`."""
    return _ChunkedLinearCrossEntropy.apply(x, weight, targets)


@torch.no_grad()
def token_statistics(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token loss and whether the top prediction is right, for evaluation.

    Args:
        x: (N, d) hidden states.
        weight: (V, d) output head.
        targets: (N,) int64 in [0, V).

    Returns:
        (N,) float32 (or float64) negative log-likelihoods in nats, and (N,) bool hits.
    """
    dtype = _matmul_type(x)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = weight.to(dtype)
    losses, hits = [], []
    with torch.autocast(x.device.type, enabled=False):
        for rows in torch.arange(x.shape[0]).split(_chunk_rows(x.shape[0], weight.shape[0])):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            z = (x[part].to(dtype) @ w.T).to(accumulate)
            y = targets[part]
            losses.append(z.logsumexp(-1) - z.gather(1, y.unsqueeze(1)).squeeze(1))
            hits.append(z.argmax(-1) == y)
    return torch.cat(losses), torch.cat(hits)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 16, generator=generator).to(device_type)
    weight = torch.randn(101, 16, generator=generator).to(device_type)
    targets = torch.randint(101, (33,), generator=generator).to(device_type)
    targets[::7] = IGNORE_INDEX
    return relative_error(
        lambda *a: backend(*a, targets), lambda *a: oracle(*a, targets), x, weight
    )


_OP = Op(
    "linear_cross_entropy",
    {"naive": linear_cross_entropy_naive, "chunked": linear_cross_entropy_chunked},
    {"default": "chunked"},
    _check,
)
