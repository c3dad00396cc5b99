"""The scans of Eq. 2 as compiled loops over rows; imported at first use, since numba is slow to.

Work is cut into tasks, one for each sequence and block of at most `BLOCK` states. A task walks over
time and treats a row of its block at each step: memory is read and written along rows, and what is
carried from step to step stays in the cache, in a `work` array of such rows.

Elements are those of `numba_math`; all sums are float32. All arrays are flat. Inputs (B, T, n)
have `strides` (batch, time) in elements, and adjacent states; everything else is contiguous. An
array that is absent is empty.

An inner loop over j reads or writes few arrays on purpose: before a vectorised loop the compiler
tests at run time that what it writes overlaps nothing else, and gives up where that are many tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from pha.ops.numba_math import complement, jit, narrow, sigmoid, widen

BLOCK = 4096
# Rows of `work` lie this far apart: not a multiple of 4096 bytes, by which a processor takes a
# load for one of a recent store.
ROW = BLOCK + 272
# The backward passes walk against time, which hardware does not fetch ahead: so many elements of
# each array are fetched first, in the order of memory. They should fit the second-level cache.
FETCHED = 32768


@jit
def _load(work: Any, row: int, source: Any, at: int, width: int) -> None:
    """Fill a row of `work` from `source`, beginning at `at`; with zeros where that is empty."""
    for j in range(width):
        work[row * ROW + j] = source[at + j] if source.size > 0 else 0


@jit
def _store(work: Any, row: int, target: Any, at: int, width: int) -> None:
    """Copy a row of `work` to `target` from `at` on."""
    for j in range(width):
        target[at + j] = work[row * ROW + j]


@jit
def _row(x: Any, b: int, t: int, strides: Any, begin: int, width: int) -> Any:
    """States begin to begin + width of sequence b at step t."""
    at = b * strides[0] + t * strides[1] + begin
    return x[at : at + width]


@jit
def scan_forward(
    first: int,
    last: int,
    block: int,
    T: int,
    n: int,
    u: Any,
    u_strides: Any,
    a: Any,
    h0: Any,
    starts: Any,
    h: Any,
    h_last: Any,
) -> None:
    """h_t = a h_{t-1} + u_t, for the tasks `first` to `last`."""
    blocks = (n + block - 1) // block
    state = np.empty(BLOCK, a.dtype)
    for task in range(first, last):
        b, begin = task // blocks, task % blocks * block
        width = min(block, n - begin)
        decay = a[begin : begin + width]
        _load(state, 0, h0, b * n + begin, width)
        for t in range(T):
            if starts.size > 0 and starts[b * T + t]:
                state[:] = 0
            u_t = _row(u, b, t, u_strides, begin, width)
            h_t = _row(h, b, t, (T * n, n), begin, width)
            for j in range(width):
                x = decay[j] * state[j] + widen(u_t[j])
                state[j] = x
                h_t[j] = narrow(x, h_t[j])
        _store(state, 0, h_last, b * n + begin, width)


@jit
def _step_back(
    work: Any,
    dh_t: Any,
    h0: Any,
    h: Any,
    starts: Any,
    b: int,
    t: int,
    T: int,
    n: int,
    begin: int,
    width: int,
) -> None:
    """One step of the backward pass on rows 0 to 3 of `work`: a, carry, da and g.

    g_t = dh_t + carry;  da += g_t h_{t-1};  carry = a g_t
    """
    if starts.size > 0 and starts[b * T + t]:
        for j in range(width):
            work[3 * ROW + j] = widen(dh_t[j]) + work[ROW + j]
            work[ROW + j] = 0
    elif t > 0:
        h_t = _row(h, b, t - 1, (T * n, n), begin, width)
        for j in range(width):
            g = widen(dh_t[j]) + work[ROW + j]
            work[3 * ROW + j] = g
            work[2 * ROW + j] += g * widen(h_t[j])
            work[ROW + j] = g * work[j]
    else:
        for j in range(width):
            g = widen(dh_t[j]) + work[ROW + j]
            work[3 * ROW + j] = g
            if h0.size > 0:
                work[2 * ROW + j] += g * h0[b * n + begin + j]
            work[ROW + j] = g * work[j]


@jit
def scan_backward(
    first: int,
    last: int,
    block: int,
    T: int,
    n: int,
    dh: Any,
    dh_strides: Any,
    dh_last: Any,
    h: Any,
    a: Any,
    h0: Any,
    starts: Any,
    du: Any,
    da: Any,
    dh0: Any,
) -> None:
    """g_t = dh_t + a g_{t+1};  du = g,  da = sum_t g_t h_{t-1} of each sequence,  dh_0 = a g_1."""
    blocks = (n + block - 1) // block
    work = np.zeros(5 * ROW, a.dtype)
    for task in range(first, last):
        b, begin = task // blocks, task % blocks * block
        width = min(block, n - begin)
        at = b * n + begin
        _load(work, 0, a, begin, width)
        _load(work, 1, dh_last, at, width)
        work[2 * ROW : 2 * ROW + width] = 0
        steps = max(1, FETCHED // width)
        for end in range(T, 0, -steps):
            for t in range(max(0, end - steps), end):
                dh_t = _row(dh, b, t, dh_strides, begin, width)
                h_t = _row(h, b, t, (T * n, n), begin, width)
                du_t = _row(du, b, t, (T * n, n), begin, width)
                line = 64 // h.itemsize
                for j in range(0, width, line):
                    work[4 * ROW + j // line] = widen(dh_t[j]) + widen(h_t[j])
                    du_t[j] = 0
            for t in range(end - 1, max(0, end - steps) - 1, -1):
                dh_t = _row(dh, b, t, dh_strides, begin, width)
                du_t = _row(du, b, t, (T * n, n), begin, width)
                _step_back(work, dh_t, h0, h, starts, b, t, T, n, begin, width)
                for j in range(width):
                    du_t[j] = narrow(work[3 * ROW + j], du_t[j])
        _store(work, 1, dh0, at, width)
        _store(work, 2, da, at, width)


@jit
def gated_scan_forward(
    first: int,
    last: int,
    block: int,
    T: int,
    n: int,
    gate: Any,
    gate_strides: Any,
    value: Any,
    value_strides: Any,
    a: Any,
    b: Any,
    h0: Any,
    starts: Any,
    mask: Any,
    h: Any,
    h_last: Any,
) -> None:
    """h_t = a h_{t-1} + b sigmoid(gate_t) value_t, without the second term where mask is false."""
    blocks = (n + block - 1) // block
    work = np.empty(3 * ROW, a.dtype)
    for task in range(first, last):
        i, begin = task // blocks, task % blocks * block
        width = min(block, n - begin)
        _load(work, 0, h0, i * n + begin, width)
        _load(work, 1, a, begin, width)
        _load(work, 2, b, begin, width)
        for t in range(T):
            if starts.size > 0 and starts[i * T + t]:
                work[:width] = 0
            gate_t = _row(gate, i, t, gate_strides, begin, width)
            value_t = _row(value, i, t, value_strides, begin, width)
            h_t = _row(h, i, t, (T * n, n), begin, width)
            if mask.size > 0 and not mask[i * T + t]:
                for j in range(width):
                    x = work[ROW + j] * work[j]
                    work[j] = x
                    h_t[j] = narrow(x, h_t[j])
            else:
                for j in range(width):
                    u = sigmoid(widen(gate_t[j])) * widen(value_t[j]) * work[2 * ROW + j]
                    x = work[ROW + j] * work[j] + u
                    work[j] = x
                    h_t[j] = narrow(x, h_t[j])
        _store(work, 0, h_last, i * n + begin, width)


@jit
def _gate_back(
    work: Any, gate_t: Any, value_t: Any, dgate_t: Any, dvalue_t: Any, width: int
) -> None:
    """From g (row 3 of `work`) and b (4) to dgate and dvalue, adding to db (5).

    With s = sigmoid(gate): dvalue = g b s, dgate = g b value s (1 - s), db = sum g s value.
    """
    for j in range(width):
        s = sigmoid(widen(gate_t[j]))
        g, v = work[3 * ROW + j], widen(value_t[j])
        gs = g * s
        work[5 * ROW + j] += gs * v
        dvalue = gs * work[4 * ROW + j]
        work[6 * ROW + j] = dvalue
        dgate_t[j] = narrow(dvalue * v * complement(s), dgate_t[j])
    for j in range(width):
        dvalue_t[j] = narrow(work[6 * ROW + j], dvalue_t[j])


@jit
def gated_scan_backward(
    first: int,
    last: int,
    block: int,
    T: int,
    n: int,
    dh: Any,
    dh_strides: Any,
    dh_last: Any,
    h: Any,
    gate: Any,
    gate_strides: Any,
    value: Any,
    value_strides: Any,
    a: Any,
    b: Any,
    h0: Any,
    starts: Any,
    mask: Any,
    dgate: Any,
    dvalue: Any,
    da: Any,
    db: Any,
    dh0: Any,
) -> None:
    """The backward pass of `scan_forward`, then of its gated input, row by row."""
    blocks = (n + block - 1) // block
    strides = (T * n, n)
    work = np.zeros(8 * ROW, a.dtype)
    for task in range(first, last):
        i, begin = task // blocks, task % blocks * block
        width = min(block, n - begin)
        at = i * n + begin
        _load(work, 0, a, begin, width)
        _load(work, 1, dh_last, at, width)
        work[2 * ROW : 2 * ROW + width] = 0
        _load(work, 4, b, begin, width)
        work[5 * ROW : 5 * ROW + width] = 0
        steps = max(1, FETCHED // width)
        for end in range(T, 0, -steps):
            for t in range(max(0, end - steps), end):
                dh_t = _row(dh, i, t, dh_strides, begin, width)
                h_t = _row(h, i, t, strides, begin, width)
                gate_t = _row(gate, i, t, gate_strides, begin, width)
                value_t = _row(value, i, t, value_strides, begin, width)
                dgate_t = _row(dgate, i, t, strides, begin, width)
                dvalue_t = _row(dvalue, i, t, strides, begin, width)
                line = 64 // h.itemsize
                for j in range(0, width, line):
                    read = widen(dh_t[j]) + widen(h_t[j]) + widen(gate_t[j]) + widen(value_t[j])
                    work[7 * ROW + j // line] = read
                    dgate_t[j] = 0
                    dvalue_t[j] = 0
            for t in range(end - 1, max(0, end - steps) - 1, -1):
                dh_t = _row(dh, i, t, dh_strides, begin, width)
                _step_back(work, dh_t, h0, h, starts, i, t, T, n, begin, width)
                dgate_t = _row(dgate, i, t, strides, begin, width)
                dvalue_t = _row(dvalue, i, t, strides, begin, width)
                if mask.size > 0 and not mask[i * T + t]:
                    dgate_t[:] = 0
                    dvalue_t[:] = 0
                else:
                    gate_t = _row(gate, i, t, gate_strides, begin, width)
                    value_t = _row(value, i, t, value_strides, begin, width)
                    _gate_back(work, gate_t, value_t, dgate_t, dvalue_t, width)
        _store(work, 1, dh0, at, width)
        _store(work, 2, da, at, width)
        _store(work, 5, db, at, width)


def signature(name: str, element: Any, real: Any) -> Any:
    """The types of a kernel's arguments, for arrays of `element` with sums in `real`."""
    many, sums, flags = (types.Array(x, 1, "C") for x in (element, real, types.uint8))
    strided = (many, types.UniTuple(types.int64, 2))
    arguments = {
        "scan_forward": (*strided, sums, sums, flags, many, sums),
        "scan_backward": (*strided, sums, many, sums, sums, flags, many, sums, sums),
        "gated_scan_forward": (*strided, *strided, sums, sums, sums, flags, flags, many, sums),
        "gated_scan_backward": (
            *(*strided, sums, many, *strided, *strided, sums, sums, sums, flags, flags),
            *(many, many, sums, sums, sums),
        ),
    }
    return types.void(*[types.int64] * 5, *arguments[name])
