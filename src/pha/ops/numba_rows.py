"""What a layer does between its matrix products, row by row; imported at first use.

A row is one token's. It is read from memory once and stays in the first-level cache for the second
pass over it, which PyTorch's operations, one at a time, make of memory again. A call of a kernel
does the rows first, first + step, ... Sums over all rows are kept by call, in row `first` of an
array of `step` rows, and added up by the caller in that order, so that they do not depend on which
thread was free. Elements are those of `numba_math`; sums are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from pha.ops.numba_math import complement, jit, jit_sum, narrow, sigmoid, widen


@jit_sum
def _sum_of_squares(x: Any, zero: Any) -> Any:
    total = zero
    for j in range(x.size):
        v = widen(x[j])
        total += v * v
    return total


@jit_sum
def _dot(a: Any, b: Any, zero: Any) -> Any:
    total = zero
    for j in range(a.size):
        total += a[j] * widen(b[j])
    return total


@jit
def norms_forward(
    first: int,
    step: int,
    tasks: int,
    d: int,
    eps: Any,
    ys: Any,
    gains: Any,
    weights: Any,
    out: Any,
    inverses: Any,
) -> None:
    """out = sum_i weights_i gain_i y_i / rms(y_i); inverses, (rows, branches), are 1 / rms(y_i)."""
    count = len(ys)
    total = np.empty(d, weights.dtype)
    for row in range(first, tasks, step):
        total[:] = 0
        for i in range(count):
            y = ys[i][row * d : row * d + d]
            mean = _sum_of_squares(y, eps - eps) / weights.dtype.type(d)
            inverse = weights.dtype.type(1) / np.sqrt(mean + eps)
            inverses[row * count + i] = inverse
            scale, gain = inverse * weights[i], gains[i]
            for j in range(d):
                total[j] += widen(y[j]) * (scale * gain[j])
        here = out[row * d : row * d + d]
        for j in range(d):
            here[j] = narrow(total[j], here[j])


@jit
def norms_backward(
    first: int,
    step: int,
    tasks: int,
    d: int,
    ys: Any,
    gains: Any,
    weights: Any,
    inverses: Any,
    dout: Any,
    dys: Any,
    dgains: Any,
    dweights: Any,
) -> None:
    """With n = y_i / rms(y_i) and g = dout gain_i: dy_i = w_i (g - n mean(g n)) / rms(y_i).

    dgain_i = sum over rows of w_i dout n, dweight_i = sum over rows of sum(g n).
    """
    count = len(ys)
    g = np.empty(d, weights.dtype)
    sums = np.zeros(count * d, weights.dtype)
    for row in range(first, tasks, step):
        upstream = dout[row * d : row * d + d]
        for i in range(count):
            y, gain = ys[i][row * d : row * d + d], gains[i]
            for j in range(d):
                g[j] = widen(upstream[j]) * gain[j]
            inverse, weight = inverses[row * count + i], weights[i]
            along = _dot(g, y, inverse - inverse) * inverse
            dweights[first * count + i] += along
            scale = inverse * weight
            back = along * inverse * inverse * weight / weights.dtype.type(d)
            mine = sums[i * d : i * d + d]
            for j in range(d):
                mine[j] += widen(upstream[j]) * (widen(y[j]) * scale)
            dy = dys[i][row * d : row * d + d]
            for j in range(d):
                dy[j] = narrow(g[j] * scale - widen(y[j]) * back, dy[j])
    for i in range(count):
        dgain = dgains[i]
        for j in range(d):
            dgain[first * d + j] = sums[i * d + j]


@jit
def rotary_forward(
    first: int,
    step: int,
    tasks: int,
    heads: int,
    half: int,
    T: int,
    batches: int,
    x: Any,
    strides: Any,
    scales: Any,
    cos: Any,
    sin: Any,
    y: Any,
) -> None:
    """For each head of a token: x / |x|, times the head's scale, each pair turned by its angle."""
    unit = np.empty(2 * half, scales.dtype)
    tiny = scales.dtype.type(1e-12)
    for row in range(first, tasks, step):
        b, t = row // T, row % T
        angles = (b % batches * T + t) * half
        c, s = cos[angles : angles + half], sin[angles : angles + half]
        for head in range(heads):
            at = b * strides[0] + t * strides[1] + head * 2 * half
            here = x[at : at + 2 * half]
            length = max(np.sqrt(_sum_of_squares(here, tiny - tiny)), tiny)
            factor = scales[head] / length
            for j in range(2 * half):
                unit[j] = widen(here[j]) * factor
            to = (row * heads + head) * 2 * half
            y1, y2 = y[to : to + half], y[to + half : to + 2 * half]
            for j in range(half):
                y1[j] = narrow(unit[j] * c[j] - unit[half + j] * s[j], y1[j])
            for j in range(half):
                y2[j] = narrow(unit[half + j] * c[j] + unit[j] * s[j], y2[j])


@jit
def rotary_backward(
    first: int,
    step: int,
    tasks: int,
    heads: int,
    half: int,
    T: int,
    batches: int,
    x: Any,
    strides: Any,
    scales: Any,
    cos: Any,
    sin: Any,
    dy: Any,
    dy_strides: Any,
    dx: Any,
    dscales: Any,
) -> None:
    """With g = dy turned back and n = x / |x|: dx = scale (g - n (g n)) / |x|, dscale = sum g n."""
    g = np.empty(2 * half, scales.dtype)
    tiny = scales.dtype.type(1e-12)
    for row in range(first, tasks, step):
        b, t = row // T, row % T
        angles = (b % batches * T + t) * half
        c, s = cos[angles : angles + half], sin[angles : angles + half]
        for head in range(heads):
            at = b * dy_strides[0] + head * dy_strides[1] + t * dy_strides[2]
            g1, g2 = dy[at : at + half], dy[at + half : at + 2 * half]
            for j in range(half):
                g[j] = widen(g1[j]) * c[j] + widen(g2[j]) * s[j]
            for j in range(half):
                g[half + j] = widen(g2[j]) * c[j] - widen(g1[j]) * s[j]
            at = b * strides[0] + t * strides[1] + head * 2 * half
            here = x[at : at + 2 * half]
            length = np.sqrt(_sum_of_squares(here, tiny - tiny))
            inverse = scales.dtype.type(1) / max(length, tiny)
            along = _dot(g, here, tiny - tiny) * inverse
            dscales[first * heads + head] += along
            factor = scales[head] * inverse
            # Below the smallest length the divisor is constant.
            back = factor * along * inverse if length > tiny else tiny - tiny
            to = (row * heads + head) * 2 * half
            out = dx[to : to + 2 * half]
            for j in range(2 * half):
                out[j] = narrow(g[j] * factor - widen(here[j]) * back, out[j])


@jit
def swiglu_forward(
    first: int,
    step: int,
    tasks: int,
    m: int,
    gate: Any,
    gate_row: int,
    up: Any,
    up_row: int,
    y: Any,
) -> None:
    """y = gate sigmoid(gate) up."""
    for row in range(first, tasks, step):
        g, u = gate[row * gate_row : row * gate_row + m], up[row * up_row : row * up_row + m]
        here = y[row * m : row * m + m]
        for j in range(m):
            x = widen(g[j])
            here[j] = narrow(x * sigmoid(x) * widen(u[j]), here[j])


@jit
def swiglu_backward(
    first: int,
    step: int,
    tasks: int,
    m: int,
    gate: Any,
    gate_row: int,
    up: Any,
    up_row: int,
    dy: Any,
    dgate: Any,
    dup: Any,
    sums: Any,
) -> None:
    """With s = sigmoid(gate): dup = dy gate s, dgate = dy up s (1 + gate (1 - s))."""
    other = np.empty(m, sums.dtype)
    for row in range(first, tasks, step):
        g, u = gate[row * gate_row : row * gate_row + m], up[row * up_row : row * up_row + m]
        upstream = dy[row * m : row * m + m]
        dg, du = dgate[row * m : row * m + m], dup[row * m : row * m + m]
        for j in range(m):
            x, v = widen(g[j]), widen(upstream[j])
            s = sigmoid(x)
            vs = v * s
            other[j] = vs * x
            dg[j] = narrow((vs + vs * x * complement(s)) * widen(u[j]), dg[j])
        for j in range(m):
            du[j] = narrow(other[j], du[j])


def signature(name: str, element: Any, real: Any, *sizes: int) -> Any:
    """The types of a kernel's arguments, for arrays of `element` with sums in `real`.

    `sizes` are, for the norms, how many branches there are and whether their output is bfloat16.
    """
    many, sums = (types.Array(x, 1, "C") for x in (element, real))
    index, strides = types.int64, types.UniTuple
    if name.startswith("norms"):
        count, to_bfloat16 = sizes
        out = types.Array(types.uint16, 1, "C") if to_bfloat16 else many
        ys, gains = types.UniTuple(many, count), types.UniTuple(sums, count)
        arguments = {
            "norms_forward": (index, real, ys, gains, sums, out, sums),
            "norms_backward": (index, ys, gains, sums, sums, out, ys, gains, sums),
        }
    else:
        rows = (many, index, many, index, many)
        rotary = (*[index] * 4, many, strides(index, 2), sums, sums, sums)
        arguments = {
            "rotary_forward": (*rotary, many),
            "rotary_backward": (*rotary, many, strides(index, 3), many, sums),
            "swiglu_forward": (index, *rows),
            "swiglu_backward": (index, *rows, many, many, sums),
        }
    return types.void(index, index, index, *arguments[name])
