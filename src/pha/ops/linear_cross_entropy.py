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
from pha.ops.precision import accumulation_type, compute_type
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
    accumulate = accumulation_type(x)
    return F.cross_entropy(
        logits.to(accumulate), targets, reduction="sum", ignore_index=IGNORE_INDEX
    )


def _chunk_rows(rows: int, vocabulary: int) -> int:
    return max(1, min(rows, CHUNK_LOGITS // vocabulary))


def _logits(x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
    """x W^T in the first rows of `buffer`."""
    z = buffer[: x.shape[0]]
    if x.dtype == buffer.dtype:
        return torch.mm(x, w.T, out=z)
    return z.copy_(x @ w.T)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        dtype = compute_type(x)
        accumulate = accumulation_type(x)
        w = weight.to(dtype)
        chunk = _chunk_rows(x.shape[0], weight.shape[0])
        total = torch.zeros((), dtype=accumulate, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros_like(weight, dtype=accumulate) if need_weight else None
        # One buffer for all chunks, overwritten in place from logits to gradients: fresh memory of
        # this size costs a page fault every 4 KiB.
        buffer = x.new_empty(chunk, weight.shape[0], dtype=accumulate)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, x.shape[0], chunk):
                rows = slice(start, start + chunk)
                x_rows, y = x[rows].to(dtype), targets[rows]
                kept = (y != IGNORE_INDEX).unsqueeze(1)
                y = y.unsqueeze(1).masked_fill(~kept, 0)
                z = _logits(x_rows, w, buffer)
                largest, target = z.amax(-1, keepdim=True), z.gather(1, y)
                exponentials = z.sub_(largest).exp_()
                mass = exponentials.sum(-1, keepdim=True)
                total += ((mass.log() + largest - target) * kept).sum()
                if dx is None and dw is None:
                    continue
                dz = exponentials.mul_(kept / mass)
                dz.scatter_add_(1, y, -kept.to(dz.dtype))
                dz = dz.to(dtype)
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
    dtype = compute_type(x)
    accumulate = accumulation_type(x)
    w = weight.to(dtype)
    losses = x.new_empty(x.shape[0], dtype=accumulate)
    hits = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    chunk = _chunk_rows(x.shape[0], weight.shape[0])
    buffer = x.new_empty(chunk, weight.shape[0], dtype=accumulate)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            y = targets[rows].unsqueeze(1)
            z = _logits(x[rows].to(dtype), w, buffer)
            largest, top = z.max(-1, keepdim=True)
            target = z.gather(1, y)
            mass = z.sub_(largest).exp_().sum(-1, keepdim=True)
            losses[rows] = (mass.log() + largest - target).squeeze(1)
            hits[rows] = (top == y).squeeze(1)
    return losses, hits


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
