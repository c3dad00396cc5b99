"""Logits to loss and gradient in one Triton kernel, in place: for the chunked loss on a GPU.

Of a row z with target y it makes logsumexp(z) - z_y and leaves softmax(z) - onehot(y) where z was.
z is read twice and written once, where PyTorch's operations pass over it some ten times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pha.ops.backends import on_device_of

BLOCK = 4096


@triton.jit
def _add_up(largest: tl.tensor, mass: tl.tensor, z: tl.tensor) -> tl.tensor:
    """The largest value and the sum of exponentials relative to it, with one more value a lane."""
    new_largest = tl.maximum(largest, z)
    return new_largest, mass * tl.exp(largest - new_largest) + tl.exp(z - new_largest)


@triton.jit
def softmax_gradient(
    z_ptr: tl.tensor,
    target_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    row_stride: tl.tensor,
    IGNORED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
) -> None:
    """One program a row. Whole blocks need no bounds, and so are loaded in vectors.

    What lies between COLUMNS and PADDED is no logit: it is not read, and its gradient is zero.
    """
    WHOLE: tl.constexpr = COLUMNS // BLOCK * BLOCK
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * row_stride
    target = tl.load(target_ptr + row)
    kept = target != IGNORED
    # A target that is no column gives a loss that is not a number, not one of stray memory.
    exists = (target >= 0) & (target < COLUMNS)
    target_logit = tl.load(z_row + target, mask=exists, other=float("nan")).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    last = WHOLE + lanes
    inside = last < COLUMNS
    # Finite, since a lane without columns would subtract infinities; such a lane adds up to nothing
    # next to any real logit.
    largest = tl.full([BLOCK], -1e30, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WHOLE, BLOCK):
        z = tl.load(z_row + start + lanes).to(tl.float32)
        largest, mass = _add_up(largest, mass, z)
    if WHOLE < COLUMNS:
        z = tl.load(z_row + last, mask=inside, other=-1e30).to(tl.float32)
        largest, mass = _add_up(largest, mass, z)
    row_largest = tl.max(largest, 0)
    row_mass = tl.sum(mass * tl.exp(largest - row_largest), 0)
    tl.store(loss_ptr + row, tl.where(kept, tl.log(row_mass) + row_largest - target_logit, 0.0))
    if GRADIENT:
        # No warp may overwrite the target's logit before all have read it.
        tl.debug_barrier()
        scale = tl.where(kept, 1.0 / row_mass, 0.0)
        for start in range(0, WHOLE, BLOCK):
            z = tl.load(z_row + start + lanes).to(tl.float32)
            dz = tl.exp(z - row_largest) * scale - ((start + lanes == target) & kept).to(tl.float32)
            tl.store(z_row + start + lanes, dz.to(z_ptr.dtype.element_ty))
        if WHOLE < COLUMNS:
            z = tl.load(z_row + last, mask=inside, other=-1e30).to(tl.float32)
            dz = tl.exp(z - row_largest) * scale - ((last == target) & kept).to(tl.float32)
            dz = tl.where(inside, dz, 0.0)
            tl.store(z_row + last, dz.to(z_ptr.dtype.element_ty), mask=last < PADDED)


def softmax_gradient_(
    z: Tensor, targets: Tensor, columns: int, ignored: int, gradient: bool
) -> Tensor:
    """Turn logits into their gradient, in place.

    Args:
        z: (N, V) logits and what pads them, each row contiguous, and best aligned; overwritten if
            the gradient is wanted.
        targets: (N,) int64 in [0, columns), or `ignored`.
        columns: how many of the V are logits. The others, fewer than BLOCK, are not read; their
            gradient is zero.
        ignored: the target of rows that count for nothing.
        gradient: whether it is wanted.

    Returns:
        (N,) float32 losses, in nats, 0 where ignored.
    """
    losses = z.new_empty(z.shape[0], dtype=torch.float32)
    sizes = z.stride(0), ignored, columns, z.shape[1]
    with on_device_of(z):
        softmax_gradient[(z.shape[0],)](z, targets, losses, *sizes, BLOCK, gradient, num_warps=8)
    return losses
