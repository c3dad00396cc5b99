"""Blocked causal attention (Dao et al., 2022) as compiled kernels; imported at first use.

Elements are float32, or bfloat16 as uint16. Products are made of words: see `numba_tiles`. Scores,
maxima, sums and accumulators are float32; weights are rounded to the type of the elements before
they multiply values, as in every fused kernel. All arrays are flat; those of elements have adjacent
head dimensions and `strides` (batch, head, position) in elements, the others are contiguous.

Nothing that is computed for a query depends on other queries or on keys it may not see: the blocks
of keys begin at fixed places, and what is masked adds exact zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from pha.ops.numba_math import exp32, jit, jit_sum, narrow, widen
from pha.ops.numba_tiles import (
    LANES,
    multiply,
    multiply_add,
    pair_gradients,
    row_maximum,
    row_weights,
)

HEIGHT = 4  # Rows of a tile.
PANEL = 64  # Keys of a tile of scores.
KEYS = 512  # Keys of a block, a multiple of PANEL: a row of tiles stays in the first cache.
QUERIES = 64  # Queries of a block, a multiple of HEIGHT.
KEYS_BACK = 64  # The same in the backward pass, which has more to keep.
_ROWS = (0,) * HEIGHT
_COLUMNS = (0,) * (PANEL // LANES)
_NEVER = np.float32(-np.inf)
_FAR = np.float32(-1e30)  # Less than any score, but a number.
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def joined(x: Any, y: Any) -> Any:
    """The word of the element x, for bfloat16 together with y."""


@overload(joined, jit_options={"error_model": "numpy"})
def _joined(x, y):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return lambda x, y: np.uint32(x) | (np.uint32(y) << np.uint32(16))
    return lambda x, y: x


@jit
def _pairs(
    x: Any, base: int, stride: int, count: int, size: int, out: Any, height: int, width: int
) -> None:
    """The words of `count` rows of x as a right operand of `height` rows, for sums over them."""
    together = 4 // x.itemsize
    out[: height // together * width] = 0
    for p in range((count + together - 1) // together):
        at = base + p * together * stride
        whole = (p + 1) * together <= count
        row = out[p * width : p * width + size]
        here = x[at : at + size]
        if whole:
            below = x[at + (together - 1) * stride : at + (together - 1) * stride + size]
            for j in range(size):
                row[j] = joined(here[j], below[j])
        else:
            for j in range(size):
                row[j] = here[j]


@jit
def pack(
    first: int,
    step: int,
    tasks: int,
    heads: int,
    length: int,
    size: int,
    padded: int,
    width: int,
    x: Any,
    strides: Any,
    columns: Any,
    pairs: Any,
) -> None:
    """The words of x (B, heads, length, size) as right operands of products.

    `columns` (B, heads, size in words, padded) is for sums over the head dimension, `pairs` (B,
    heads, padded in words, width) for sums over positions. One of them may be empty. Beyond the
    length and the size both are zero. A task is PANEL positions of a head.
    """
    together = 4 // x.itemsize
    deep = (size + together - 1) // together
    blocks = padded // PANEL
    for task in range(first, tasks, step):
        head, begin = task // blocks, task % blocks * PANEL
        base = head // heads * strides[0] + head % heads * strides[1] + begin * strides[2]
        if columns.size > 0:
            for start in range(begin, begin + PANEL, LANES):
                count = max(0, min(LANES, length - start))
                for w in range(deep):
                    whole = (w + 1) * together <= size
                    at = (head * deep + w) * padded + start
                    out = columns[at : at + LANES]
                    source = base + (start - begin) * strides[2] + w * together
                    for i in range(count):
                        out[i] = joined(x[source], x[source + together - 1]) if whole else x[source]
                        source += strides[2]
                    out[count:] = 0
        if pairs.size > 0:
            at, whole = (head * padded + begin) // together * width, PANEL // together * width
            count = min(PANEL, length - begin)
            _pairs(x, base, strides[2], count, size, pairs[at : at + whole], PANEL, width)


@jit
def sum_heads(
    first: int,
    step: int,
    tasks: int,
    groups: int,
    length: int,
    size: int,
    padded: int,
    width: int,
    x: Any,
    out: Any,
) -> None:
    """Sums over `groups` heads of x (heads groups, padded, width): out (heads, length, size).

    A task is PANEL positions of a head of `out`.
    """
    blocks = padded // PANEL
    total = np.empty(width, np.float32)
    for task in range(first, tasks, step):
        head, begin = task // blocks, task % blocks * PANEL
        for position in range(begin, min(begin + PANEL, length)):
            total[:] = 0
            for i in range(head * groups, (head + 1) * groups):
                row = x[(i * padded + position) * width : (i * padded + position + 1) * width]
                for j in range(width):
                    total[j] += row[j]
            at = (head * length + position) * size
            target = out[at : at + size]
            for j in range(size):
                target[j] = narrow(total[j], target[j])


@jit
def _rows(x: Any, base: int, stride: int, count: int, size: int, out: Any, height: int) -> None:
    """The words of `count` rows of x as a left operand of `height` rows; zeros beyond."""
    together = 4 // x.itemsize
    deep = (size + together - 1) // together
    out[count * deep : height * deep] = 0
    for r in range(count):
        row, words = x[base + r * stride : base + r * stride + size], out[r * deep : (r + 1) * deep]
        for w in range(size // together):
            words[w] = joined(row[w * together], row[w * together + together - 1])
        if size % together > 0:
            words[deep - 1] = row[size - 1]


@jit
def _hide(s: Any, at: int, width: int, low: int, high: int) -> None:
    """Set what is not within low .. high - 1 of a row of scores to minus infinity."""
    for j in range(min(max(low, 0), width)):
        s[at + j] = _NEVER
    for j in range(min(max(high, 0), width), width):
        s[at + j] = _NEVER


@jit
def forward(
    first: int,
    step: int,
    tasks: int,
    heads: int,
    groups: int,
    T: int,
    S: int,
    size: int,
    padded: int,
    width: int,
    window: int,
    panel: Any,
    q: Any,
    q_strides: Any,
    k_columns: Any,
    v_pairs: Any,
    y: Any,
    y_strides: Any,
    lse: Any,
) -> None:
    """y = softmax(q k^T) v, and the logarithms of the sums of exponentials, by blocks of queries.

    Task i is block i // (B heads) of one head, so that threads with every n-th get equal work.
    """
    together = 4 // y.itemsize
    deep = (size + together - 1) // together
    past = S - T
    blocks = (T + QUERIES - 1) // QUERIES
    heads_in_all = tasks // blocks
    rows = np.empty(QUERIES * deep, k_columns.dtype)
    s = np.empty(HEIGHT * KEYS, np.float32)
    p = np.empty(HEIGHT * KEYS // together, k_columns.dtype)
    weights = p.view(y.dtype)
    o = np.empty(QUERIES * width, np.float32)
    tops, sums = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
    across = len(panel) * LANES
    for task in range(first, tasks, step):
        head, begin = task % heads_in_all, task // heads_in_all * QUERIES
        b, h = head // heads, head % heads
        shared = b * (heads // groups) + h // groups
        count = min(QUERIES, T - begin)
        height = (count + HEIGHT - 1) // HEIGHT * HEIGHT
        at = b * q_strides[0] + h * q_strides[1] + begin * q_strides[2]
        _rows(q, at, q_strides[2], count, size, rows, height)
        o[:] = 0
        tops[:] = _FAR
        sums[:] = 0
        lowest = max(0, past + begin - window + 1)
        for start in range(lowest // KEYS * KEYS, past + begin + count, KEYS):
            for r in range(0, height, HEIGHT):
                query = past + begin + r  # the position of the first row
                low = max(start, (query - window + 1) // PANEL * PANEL)
                high = min(start + KEYS, (query + HEIGHT + PANEL - 1) // PANEL * PANEL, padded)
                keys = high - low
                if keys <= 0:
                    continue
                for j in range(0, keys, PANEL):
                    column = shared * deep * padded + low + j
                    multiply(
                        *(s, j, KEYS, rows, r * deep, deep, 1),
                        *(k_columns, column, padded, deep, _ROWS, _COLUMNS),
                    )
                for i in range(HEIGHT):
                    see = query + i + 1 - low  # one more than the last key of this row
                    if see < keys or see - window > 0:
                        _hide(s, i * KEYS, keys, see - window, see)
                    before = tops[r + i]
                    top = row_maximum(s, i * KEYS, keys, before)
                    if top > before:
                        shrink = exp32(before - top)
                        tops[r + i] = top
                        sums[r + i] *= shrink
                        row = o[(r + i) * width : (r + i + 1) * width]
                        for j in range(width):
                            row[j] *= shrink
                    sums[r + i] += row_weights(s, i * KEYS, keys, top, weights, i * KEYS)
                for j in range(0, width, across):
                    value = (shared * padded + low) // together * width + j
                    multiply_add(
                        *(o, r * width + j, width, p, 0, KEYS // together, 1),
                        *(v_pairs, value, width, keys // together, _ROWS, panel),
                    )
        for r in range(count):
            at = b * y_strides[0] + h * y_strides[1] + (begin + r) * y_strides[2]
            out, row, scale = y[at : at + size], o[r * width : r * width + size], _ONE / sums[r]
            for j in range(size):
                out[j] = narrow(row[j] * scale, out[j])
            lse[head * T + begin + r] = tops[r] + np.log(sums[r])


@jit_sum
def _dot(x: Any, y: Any) -> Any:
    total = _ZERO
    for j in range(x.size):
        total += widen(x[j]) * widen(y[j])
    return total


@jit
def backward(
    first: int,
    step: int,
    tasks: int,
    heads: int,
    groups: int,
    T: int,
    S: int,
    size: int,
    padded: int,
    width: int,
    window: int,
    panel: Any,
    q: Any,
    q_strides: Any,
    k_columns: Any,
    k_pairs: Any,
    v_columns: Any,
    y: Any,
    y_strides: Any,
    dy: Any,
    dy_strides: Any,
    lse: Any,
    dq: Any,
    dq_strides: Any,
    dk: Any,
    dv: Any,
) -> None:
    """Gradients by blocks of queries and keys, from weights that are computed again.

    With P = exp(q k^T - lse), delta = sum_j dy_j y_j and dS = P (dy v^T - delta):
    dq = dS k, dk = dS^T q, dv = P^T dy. A task is a head; dk and dv (B, heads, padded, width) in
    float32 are those of each query head, to be summed over those that share a key head.
    """
    together = 4 // y.itemsize
    deep = (size + together - 1) // together
    past = S - T
    q_left = np.empty(QUERIES * deep, k_columns.dtype)
    dy_left = np.empty(QUERIES * deep, k_columns.dtype)
    q_pairs = np.empty(QUERIES * width // together, k_columns.dtype)
    dy_pairs = np.empty(QUERIES * width // together, k_columns.dtype)
    s = np.empty(HEIGHT * KEYS_BACK, np.float32)
    dp = np.empty(HEIGHT * KEYS_BACK, np.float32)
    left = np.empty(HEIGHT * KEYS_BACK // together, k_columns.dtype)
    left_elements = left.view(y.dtype)
    p = np.empty(QUERIES * KEYS_BACK // together, k_columns.dtype)
    ds = np.empty(QUERIES * KEYS_BACK // together, k_columns.dtype)
    dq_rows = np.empty(QUERIES * width, np.float32)
    shift, delta = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
    across = len(panel) * LANES
    for task in range(first, tasks, step):
        b, h = task // heads, task % heads
        shared = b * (heads // groups) + h // groups
        dk[task * padded * width : (task + 1) * padded * width] = 0
        dv[task * padded * width : (task + 1) * padded * width] = 0
        for begin in range(0, T, QUERIES):
            count = min(QUERIES, T - begin)
            height = (count + HEIGHT - 1) // HEIGHT * HEIGHT
            q_at = b * q_strides[0] + h * q_strides[1] + begin * q_strides[2]
            dy_at = b * dy_strides[0] + h * dy_strides[1] + begin * dy_strides[2]
            y_at = b * y_strides[0] + h * y_strides[1] + begin * y_strides[2]
            _rows(q, q_at, q_strides[2], count, size, q_left, height)
            _rows(dy, dy_at, dy_strides[2], count, size, dy_left, height)
            _pairs(q, q_at, q_strides[2], count, size, q_pairs, height, width)
            _pairs(dy, dy_at, dy_strides[2], count, size, dy_pairs, height, width)
            shift[:] = np.inf  # Rows beyond the last query have no weights.
            delta[:] = 0
            for r in range(count):
                shift[r] = lse[task * T + begin + r]
                i, j = y_at + r * y_strides[2], dy_at + r * dy_strides[2]
                delta[r] = _dot(y[i : i + size], dy[j : j + size])
            dq_rows[:] = 0
            lowest = max(0, past + begin - window + 1)
            for start in range(lowest // KEYS_BACK * KEYS_BACK, past + begin + count, KEYS_BACK):
                for r in range(0, height, HEIGHT):
                    query = past + begin + r
                    low = max(start, (query - window + 1) // PANEL * PANEL)
                    high = (query + HEIGHT + PANEL - 1) // PANEL * PANEL
                    high = min(start + KEYS_BACK, high, padded)
                    keys = high - low
                    if keys <= 0:
                        continue
                    for j in range(0, keys, PANEL):
                        column = shared * deep * padded + low + j
                        multiply(
                            *(s, j, KEYS_BACK, q_left, r * deep, deep, 1),
                            *(k_columns, column, padded, deep, _ROWS, _COLUMNS),
                        )
                        multiply(
                            *(dp, j, KEYS_BACK, dy_left, r * deep, deep, 1),
                            *(v_columns, column, padded, deep, _ROWS, _COLUMNS),
                        )
                    for i in range(HEIGHT):
                        see = query + i + 1 - low
                        if see < keys or see - window > 0:
                            _hide(s, i * KEYS_BACK, keys, see - window, see)
                    for i in range(0, HEIGHT, 2):
                        pair_gradients(
                            *(s, dp, i * KEYS_BACK, KEYS_BACK, keys, shift, delta, r + i, p, ds),
                            (r + i) // together * KEYS_BACK + low - start,
                            *(left_elements, i * KEYS_BACK),
                        )
                    for j in range(0, width, across):
                        at = (shared * padded + low) // together * width + j
                        multiply_add(
                            *(dq_rows, r * width + j, width, left, 0, KEYS_BACK // together, 1),
                            *(k_pairs, at, width, keys // together, _ROWS, panel),
                        )
                # Which queries see any of a tile of keys, in whole tiles of queries.
                for key in range(start, min(start + KEYS_BACK, past + begin + count), HEIGHT):
                    from_row = max(0, key - past - begin) // HEIGHT * HEIGHT
                    to_row = min(height, key + HEIGHT - 1 + window - past - begin)
                    to_row = (to_row + HEIGHT - 1) // HEIGHT * HEIGHT
                    depth = (to_row - from_row) // together
                    if depth <= 0:
                        continue
                    at = from_row // together * KEYS_BACK + key - start
                    for j in range(0, width, across):
                        target = (task * padded + key) * width + j
                        source = from_row // together * width + j
                        multiply_add(
                            *(dv, target, width, p, at, 1, KEYS_BACK),
                            *(dy_pairs, source, width, depth, _ROWS, panel),
                        )
                        multiply_add(
                            *(dk, target, width, ds, at, 1, KEYS_BACK),
                            *(q_pairs, source, width, depth, _ROWS, panel),
                        )
            for r in range(count):
                at = b * dq_strides[0] + h * dq_strides[1] + (begin + r) * dq_strides[2]
                out, row = dq[at : at + size], dq_rows[r * width : r * width + size]
                for j in range(size):
                    out[j] = narrow(row[j], out[j])


def signature(name: str, element: Any, real: Any, vectors: int) -> Any:
    """The types of a kernel's arguments, for panels of so many vectors of head dimensions."""
    word = types.uint32 if element == types.uint16 else types.float32
    many, words, sums = (types.Array(x, 1, "C") for x in (element, word, real))
    strided = (many, types.UniTuple(types.int64, 3))
    panel = types.UniTuple(types.int64, vectors)
    arguments = {
        "pack": (*[types.int64] * 8, *strided, words, words),
        "sum_heads": (*[types.int64] * 8, sums, many),
        "forward": (*[types.int64] * 11, panel, *strided, words, words, *strided, sums),
        "backward": (
            *(*[types.int64] * 11, panel, *strided, words, words, words),
            *(*strided, *strided, sums, *strided, sums, sums),
        ),
    }
    return types.void(*arguments[name])
