"""Output head and cross-entropy in one op that never holds all N x V logits.

For a chunk of rows, z = x W^T, the loss of a row with target y is logsumexp(z) - z_y, and
dz = softmax(z) - onehot(y), dx = dz W, dW = dz^T x. The gradients of a chunk are formed while its
logits are at hand, so the logits are computed once and only dx and dW are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pha.ops.backends import Op
from pha.ops.precision import accumulation_type, compute_type
from pha.ops.testing import random_numbers, relative_error
from pha.utils.errors import PHAError

IGNORE_INDEX = -100
# Rows times vocabulary per chunk: 128 MiB of float32 logits on a CPU, 8,192 rows of GPT-2's
# vocabulary on a CUDA device with the memory for it, 512 MiB elsewhere. Smaller chunks spend their
# time adding into dW (V x d); on a CPU larger ones fall out of the caches.
CHUNK_LOGITS = {"cpu": 1 << 25, "cuda": 8192 * 50304, "default": 1 << 27}
# Rows at most on a CPU, those of GPT-2's vocabulary that fit: more take more memory and no less
# time (docs/log.md).
CPU_ROWS = CHUNK_LOGITS["cpu"] // 50257
SHARE = 0.02  # of a CUDA device's memory that a chunk may take at most, at 4 bytes a logit
ALIGNMENT = 64  # elements: aligned rows of logits have a multiple, and so has the vocabulary


def chunk_logits(device: torch.device, vocabulary: int, memory: int | None = None) -> int:
    """Rows times vocabulary that are held at a time on a device, of so many bytes if it is away."""
    most = CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["default"])
    if device.type == "cpu":
        return min(most, CPU_ROWS * vocabulary)
    if device.type != "cuda":
        return most
    if memory is None:
        memory = torch.cuda.get_device_properties(device).total_memory
    return min(most, int(SHARE / 4 * memory))


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log softmax(x W^T)[target], in nats.

    Matrix products run in the autocast type, softmax and sums in float32 (float64 for float64).

    Args:
        x: (N, d) hidden states.
        weight: (V, d) output head.
        targets: (N,) int64 in [0, V); rows with `IGNORE_INDEX` count for nothing.

    Returns:
        Scalar, float32 or float64. Differentiable once, in x and weight.

    Raises:
        PHAError: shapes that do not fit each other, or targets that are not int64.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise PHAError(f"the loss: x {tuple(x.shape)} and head {tuple(weight.shape)} do not fit")
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise PHAError(
            f"the loss: targets are {tuple(targets.shape)} of {targets.dtype}; give one int64 for "
            f"each of {x.shape[0]} rows"
        )
    return _OP(x.device.type)(x, weight, targets)


def linear_cross_entropy_naive(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The oracle: all logits, PyTorch's cross-entropy."""
    logits = F.linear(x, weight)
    accumulate = accumulation_type(x)
    return F.cross_entropy(
        logits.to(accumulate), targets, reduction="sum", ignore_index=IGNORE_INDEX
    )


def linear_cross_entropy_torch(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own chunks, from version 2.13 on."""
    dtype, accumulate = compute_type(x), accumulation_type(x)
    with torch.autocast(x.device.type, enabled=False):
        options = torch.nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(
            x.to(dtype), weight.to(dtype), targets, reduction="sum", options=options
        )
    return loss.to(accumulate)


def _chunk_rows(x: Tensor, weight: Tensor) -> int:
    """Rows at a time: about `chunk_logits`, in chunks of one size, none of them a small rest."""
    rows = x.shape[0]
    chunks = max(1, round(rows * len(weight) / chunk_logits(x.device, len(weight))))
    return max(1, -(-rows // chunks))


def _logits(x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
    """x W^T in the first rows of `buffer`."""
    z = buffer[: x.shape[0]]
    if x.dtype == buffer.dtype:
        return torch.mm(x, w.T, out=z)
    return z.copy_(x @ w.T)


def chunk_by_torch(
    x: Tensor, w: Tensor, y: Tensor, buffer: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk, and dz in the type of x if it is wanted; z is overwritten."""
    kept = (y != IGNORE_INDEX).unsqueeze(1)
    y = y.unsqueeze(1).masked_fill(~kept, 0)
    z = _logits(x, w, buffer)
    largest, target = z.amax(-1, keepdim=True), z.gather(1, y)
    exponentials = z.sub_(largest).exp_()
    mass = exponentials.sum(-1, keepdim=True)
    loss = ((mass.log() + largest - target) * kept).sum()
    if not gradient:
        return loss, exponentials
    dz = exponentials.mul_(kept / mass)
    dz.scatter_add_(1, y, -kept.to(dz.dtype))
    return loss, dz.to(x.dtype)


def padded(weight: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """`weight` in another type, and with zeros below it up to `rows`."""
    if rows == weight.shape[0]:
        return weight.to(dtype)
    w = weight.new_zeros(rows, weight.shape[1], dtype=dtype)
    w[: weight.shape[0]] = weight
    return w


def _add_product_(dw: Tensor, dz: Tensor, x: Tensor) -> None:
    """dw += dz^T x: in one pass where the types allow it, else the product is added after."""
    if dz.dtype == dw.dtype:
        dw.addmm_(dz.T, x)
    elif dw.is_cuda:  # The product is not rounded to the type of its factors.
        torch.addmm(dw, dz.T, x, out_dtype=dw.dtype, out=dw)
    else:
        dw += dz.T @ x


def _chunk_by_chunk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    triton: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, dx and dW; a gradient that is not needed has no elements."""
    total, dx, _ = _outputs(x, weight, targets, dtype, triton, need_x, False)
    total.zero_()
    vocabulary = weight.shape[0]
    chunk_loss: Callable[..., tuple[Tensor, Tensor]] = chunk_by_torch
    logits, columns = total.dtype, vocabulary
    if triton and dtype != torch.float64:
        _OP.require("triton", x)
        chunk_loss = functools.partial(_OP.kernels["chunk"], vocabulary=vocabulary)
        # Products of aligned extents take the fast kernels.
        logits, columns = dtype, -(-vocabulary // ALIGNMENT) * ALIGNMENT
    w = padded(weight, dtype, columns)
    dw = total.new_zeros(w.shape if need_weight else 0)
    chunk = _chunk_rows(x, weight)
    # One buffer for all chunks, overwritten in place from logits to gradients: fresh memory of this
    # size costs a page fault every 4 KiB. Zeros, since products may read past the end of a row:
    # those in bfloat16 on a CPU with AMX do.
    buffer = x.new_zeros(chunk, columns, dtype=logits)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            x_rows = x[rows].to(dtype)
            loss, dz = chunk_loss(x_rows, w, targets[rows], buffer, need_x or need_weight)
            total += loss
            if need_x:
                dx[rows] = dz @ w
            if need_weight:
                _add_product_(dw, dz, x_rows)
    return total, dx, dw[:vocabulary]


def _outputs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    triton: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = accumulation_type(x)
    total = x.new_empty((), dtype=accumulate)
    dx = x.new_empty(x.shape if need_x else 0)
    return total, dx, weight.new_empty(weight.shape if need_weight else 0, dtype=accumulate)


# One operator, so that a graph of torch.compile holds it whole and not every chunk.
_loss_and_gradients = torch.library.custom_op(
    "pha::linear_cross_entropy",
    _chunk_by_chunk,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor targets, ScalarType dtype, bool triton, "
    "bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor)",
)
_loss_and_gradients.register_fake(_outputs)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, triton: bool) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        total, dx, dw = _loss_and_gradients(
            x, weight, targets, compute_type(x), triton, need_x, need_weight
        )
        ctx.save_for_backward(dx if need_x else None, dw.to(weight.dtype) if need_weight else None)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        scaled = [None if g is None else g * gradient.to(g.dtype) for g in (dx, dw)]
        return (*scaled, None, None)


def linear_cross_entropy_chunked(
    x: Tensor, weight: Tensor, targets: Tensor, triton: bool = False
) -> Tensor:
    """Chunks of about `chunk_logits` logits. See `linear_cross_entropy`.

    With `triton` softmax and gradient are one kernel on logits of the compute type.
    """
    return _ChunkedLinearCrossEntropy.apply(x, weight, targets, triton)


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
    chunk = _chunk_rows(x, weight)
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
    normal, uniform = random_numbers(device_type)
    x, weight, targets = normal(33, 16), normal(101, 16), (101 * uniform(33)).long()
    targets[::7] = IGNORE_INDEX
    return relative_error(
        lambda *a: backend(*a, targets), lambda *a: oracle(*a, targets), x, weight
    )


_OP = Op(
    "linear_cross_entropy",
    {
        "naive": linear_cross_entropy_naive,
        "chunked": linear_cross_entropy_chunked,
    }
    | ({"torch": linear_cross_entropy_torch} if hasattr(F, "linear_cross_entropy") else {}),
    {"default": "chunked"},
    _check,
    plain="chunked",
)
