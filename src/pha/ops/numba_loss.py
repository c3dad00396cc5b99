"""Logits to loss and gradient in one compiled pass over each row; imported at first use.

The same as the Triton kernel for GPUs computes: logsumexp(z) - z_y of a row z with target y, and
softmax(z) - onehot(y) in the place of z. A row is read from memory once, since it then stays in the
second cache; PyTorch's operations pass over all rows some ten times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from pha.ops.numba_math import exp32, jit, jit_sum, narrow, widen

PART = 2**16
LANES = 256  # Maxima kept side by side, so that a row's is found with vectors.
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_FAR = np.float32(-3e38)


@jit
def _largest(z: Any, lanes: Any) -> Any:
    """The largest number of a row; not a number counts as the smallest."""
    lanes[:] = _FAR
    whole = z.size // LANES * LANES
    for start in range(0, whole, LANES):
        part = z[start : start + LANES]
        for j in range(LANES):
            x = widen(part[j])
            lanes[j] = x if x > lanes[j] else lanes[j]
    largest = _FAR
    for j in range(LANES):
        largest = lanes[j] if lanes[j] > largest else largest
    for j in range(whole, z.size):
        x = widen(z[j])
        largest = x if x > largest else largest
    return largest


@jit
def _exponentials(z: Any, largest: Any, out: Any) -> None:
    for j in range(z.size):
        out[j] = exp32(widen(z[j]) - largest)


@jit_sum
def _sum(x: Any) -> Any:
    total = _ZERO
    for j in range(x.size):
        total += x[j]
    return total


@jit
def softmax_gradient(
    first: int,
    step: int,
    tasks: int,
    columns: int,
    stride: int,
    ignored: int,
    gradient: bool,
    z: Any,
    targets: Any,
    losses: Any,
) -> None:
    """Rows first, first + step, ... of z; rows whose target is `ignored` lose and give nothing."""
    lanes = np.empty(LANES, np.float32)
    exponentials = np.empty(columns, np.float32)
    for row in range(first, tasks, step):
        here = z[row * stride : row * stride + columns]
        target = targets[row]
        if target == ignored:
            losses[row] = _ZERO
            if gradient:
                here[:] = 0
            continue
        largest = _largest(here, lanes)
        _exponentials(here, largest, exponentials)
        mass = _sum(exponentials)
        losses[row] = np.log(mass) + largest - widen(here[target])
        if gradient:
            scale = _ONE / mass
            for j in range(columns):
                here[j] = narrow(exponentials[j] * scale, here[j])
            here[target] = narrow(exponentials[target] * scale - _ONE, here[target])


@jit
def add_to(first: int, step: int, tasks: int, total: Any, part: Any) -> None:
    """total += part. A task is PART elements; PyTorch is five times slower where types differ."""
    for task in range(first, tasks, step):
        end = min((task + 1) * PART, total.size)
        to, new = total[task * PART : end], part[task * PART : end]
        for j in range(to.size):
            to[j] += widen(new[j])


def signature(name: str, element: Any, real: Any) -> Any:
    """The types of the arguments of a kernel for arrays of `element`."""
    index = types.intp
    if name == "add_to":
        return types.void(index, index, index, real[::1], element[::1])
    return types.void(*(index,) * 6, types.boolean, element[::1], types.int64[::1], real[::1])
