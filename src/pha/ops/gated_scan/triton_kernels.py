"""The gated scan, and the linear one, in Triton: each program walks BLOCK states in time.

With one chunk the whole time axis is walked at once. With several chunks of `length` steps, those
of a sequence run side by side, in three passes. The recurrence is linear: a chunk turns the state h
that comes in into P h + L. The first pass finds P (the product of its decays) and L (its last state
from zero), the second runs over the chunks and gives each the state that comes in, the third walks
each chunk from there. The backward direction is the same against time. P is infinite after a start,
where nothing is left of h, whatever it is; and no number where a decay of zero follows, which
`combine` takes for the same. A P of zero is a product that underflows: what is no number remains
so.

Programs take the index of the block of states fastest, then that of the chunk, then that of the
sequence. Loads of UNROLL steps are issued before their first use, and the compiler stages those of
the next steps. Offsets along B and T are 64-bit. Sums are in the type of the states, without
atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(n, chunks, BLOCK: tl.constexpr, PAIRED: tl.constexpr):
    """Sequence, chunk and states of this program, and which of the states exist."""
    blocks = tl.cdiv(n, BLOCK)
    program = tl.program_id(0)
    states = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = states < n
    if PAIRED:
        exists = tl.max_constancy(exists, 2)
    rest = program // blocks
    return (rest // chunks).to(tl.int64), rest % chunks, states, exists


@triton.jit
def _at(x, t, stride, states, PAIRED: tl.constexpr):
    row = x + tl.cast(t, tl.int64) * stride
    if PAIRED:  # which is not less than the compiler knows itself: see `_paired`
        row = tl.multiple_of(row, 4)
    return row + states


@triton.jit
def _row(x, t, stride, states, inside, PAIRED: tl.constexpr):
    return tl.load(_at(x, t, stride, states, PAIRED), mask=inside, other=0.0)


@triton.jit
def _flag(x, t, inside, PRESENT: tl.constexpr):
    if PRESENT:
        return tl.load(x + t, mask=inside, other=0) != 0
    return False


@triton.jit(do_not_specialize=["T", "chunks", "length"])
def forward(
    x,
    x_B,
    x_T,
    y,
    y_B,
    y_T,
    a,
    b,
    initial,
    starts,
    h,
    last,
    product,
    T,
    n,
    chunks,
    length,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    SUMMARY: tl.constexpr,
    GATED: tl.constexpr,
):
    """Write h (B, T, n) and `last` (B, n); a SUMMARY writes L and P (B, chunks, n) instead.

    `initial` (B, chunks, n) is the state before each chunk. x and y (B, T, n) are gate and value
    where it is GATED, else what is added and the decays, and there are no `a` and `b` (n,).
    """
    sequence, chunk, states, exists = _place(n, chunks, BLOCK, PAIRED)
    first = chunk * length
    end = tl.minimum(first + length, T)
    x += sequence * x_B
    y += sequence * y_B
    starts += sequence * T
    h += sequence * T * n
    summary = (sequence * chunks + chunk) * n + states
    state = tl.zeros([BLOCK], last.dtype.element_ty)
    if GATED:
        decay = tl.load(a + states, mask=exists, other=0.0)
        scale = tl.load(b + states, mask=exists, other=0.0)
    if HAS_INITIAL:
        state = tl.load(initial + summary, mask=exists, other=0.0)
    kept = tl.zeros_like(state) + 1.0
    for t0 in tl.range(first, end, UNROLL, num_stages=STAGES):
        xs, ys, resets = (), (), ()
        for i in tl.static_range(UNROLL):
            inside = t0 + i < end
            xs += (_row(x, t0 + i, x_T, states, exists & inside, PAIRED),)
            ys += (_row(y, t0 + i, y_T, states, exists & inside, PAIRED),)
            resets += (_flag(starts, t0 + i, inside, HAS_STARTS),)
        for i in tl.static_range(UNROLL):
            inside = t0 + i < end
            if GATED:
                u = scale * tl.sigmoid(xs[i].to(scale.dtype)) * ys[i].to(scale.dtype)
            else:
                u = xs[i].to(state.dtype)
                decay = ys[i].to(state.dtype)
            before = state
            if HAS_STARTS:
                before = tl.where(resets[i], 0.0, state)
            state = tl.where(inside, decay * before + u, state)
            if SUMMARY:
                kept = tl.where(inside, kept * decay, kept)
                if HAS_STARTS:
                    kept = tl.where(resets[i], float("inf"), kept)
            else:
                place = _at(h, t0 + i, n, states, PAIRED)
                tl.store(place, state.to(h.dtype.element_ty), mask=exists & inside)
    if SUMMARY:
        tl.store(last + summary, state, mask=exists)
        tl.store(product + summary, kept, mask=exists)
    else:
        tl.store(last + sequence * n + states, state, mask=exists & (chunk == chunks - 1))


@triton.jit(do_not_specialize=["T", "chunks", "length"])
def backward_summary(
    dh,
    dh_B,
    dh_T,
    a,
    a_B,
    a_T,
    starts,
    last,
    product,
    T,
    n,
    chunks,
    length,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Write L and P (B, chunks, n) of the gradient that leaves each chunk at its beginning.

    `a` is (n,) where it is GATED, else (B, T, n).
    """
    sequence, chunk, states, exists = _place(n, chunks, BLOCK, PAIRED)
    first = chunk * length
    end = tl.minimum(first + length, T)
    dh += sequence * dh_B
    starts += sequence * T
    summary = (sequence * chunks + chunk) * n + states
    carry = tl.zeros([BLOCK], last.dtype.element_ty)
    kept = carry + 1.0
    if GATED:
        decay = tl.load(a + states, mask=exists, other=0.0)
    else:
        a += sequence * a_B
    for back in tl.range(0, end - first, UNROLL, num_stages=STAGES):
        t0 = end - 1 - back
        gradients, decays, resets = (), (), ()
        for i in tl.static_range(UNROLL):
            inside = t0 - i >= first
            gradients += (_row(dh, t0 - i, dh_T, states, exists & inside, PAIRED),)
            if not GATED:
                decays += (_row(a, t0 - i, a_T, states, exists & inside, PAIRED),)
            resets += (_flag(starts, t0 - i, inside, HAS_STARTS),)
        for i in tl.static_range(UNROLL):
            inside = t0 - i >= first
            if not GATED:
                decay = decays[i].to(carry.dtype)
            g = gradients[i].to(carry.dtype) + carry
            kept = tl.where(inside, kept * decay, kept)
            if HAS_STARTS:
                g = tl.where(resets[i], 0.0, g)
                kept = tl.where(resets[i], float("inf"), kept)
            carry = tl.where(inside, decay * g, carry)
    tl.store(last + summary, carry, mask=exists)
    tl.store(product + summary, kept, mask=exists)


@triton.jit(do_not_specialize=["chunks"])
def combine(
    initial,
    last,
    product,
    incoming,
    n,
    chunks,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Write what comes into each chunk (B, chunks, n), from `initial` (B, n) and the L and P."""
    sequence, _, states, exists = _place(n, 1, BLOCK, False)
    state = tl.zeros([BLOCK], incoming.dtype.element_ty)
    if HAS_INITIAL:
        state = tl.load(initial + sequence * n + states, mask=exists, other=0.0)
    for c0 in tl.range(0, chunks, UNROLL):
        products, lasts = (), ()
        for i in tl.static_range(UNROLL):
            chunk = c0 + i
            if REVERSE:
                chunk = chunks - 1 - chunk
            inside = exists & (c0 + i < chunks)
            place = (sequence * chunks + chunk) * n + states
            products += (tl.load(product + place, mask=inside, other=0.0),)
            lasts += (tl.load(last + place, mask=inside, other=0.0),)
        for i in tl.static_range(UNROLL):
            chunk = c0 + i
            if REVERSE:
                chunk = chunks - 1 - chunk
            place = (sequence * chunks + chunk) * n + states
            tl.store(incoming + place, state, mask=exists & (c0 + i < chunks))
            kept = tl.abs(products[i]) < float("inf")  # decays may be negative
            state = tl.where(kept, products[i] * state, 0.0) + lasts[i]


@triton.jit(do_not_specialize=["T", "chunks", "length"])
def backward(
    dh,
    dh_B,
    dh_T,
    incoming,
    h,
    x,
    x_B,
    x_T,
    y,
    y_B,
    y_T,
    a,
    b,
    h0,
    starts,
    dx,
    dy,
    da,
    db,
    dh0,
    T,
    n,
    chunks,
    length,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Write dx, dy (B, T, n), dh0 (B, n) and, where it is GATED, each chunk's part of da and db.

    `incoming` (B, chunks, n) is the gradient that reaches the last state of each chunk from later.
    As in `forward`; where it is not GATED x is not read.
    """
    sequence, chunk, states, exists = _place(n, chunks, BLOCK, PAIRED)
    first = chunk * length
    end = tl.minimum(first + length, T)
    dh += sequence * dh_B
    y += sequence * y_B
    starts += sequence * T
    h += sequence * T * n
    dx += sequence * T * n
    dy += sequence * T * n
    part = (sequence * chunks + chunk) * n + states
    carry = tl.load(incoming + part, mask=exists, other=0.0)
    if GATED:
        x += sequence * x_B
        decay = tl.load(a + states, mask=exists, other=0.0)
        scale = tl.load(b + states, mask=exists, other=0.0)
        sum_a = tl.zeros_like(decay)
        sum_b = tl.zeros_like(decay)
    start = tl.zeros_like(carry)
    if HAS_H0:
        start = tl.load(h0 + sequence * n + states, mask=exists, other=0.0)
    for back in tl.range(0, end - first, UNROLL, num_stages=STAGES):
        t0 = end - 1 - back
        gradients, befores, xs, ys, resets = (), (), (), (), ()
        for i in tl.static_range(UNROLL):
            t = t0 - i
            inside = t >= first
            gradients += (_row(dh, t, dh_T, states, exists & inside, PAIRED),)
            befores += (_row(h, t - 1, n, states, exists & inside & (t > 0), PAIRED),)
            if GATED:
                xs += (_row(x, t, x_T, states, exists & inside, PAIRED),)
            ys += (_row(y, t, y_T, states, exists & inside, PAIRED),)
            resets += (_flag(starts, t, inside, HAS_STARTS),)
        for i in tl.static_range(UNROLL):
            t = t0 - i
            inside = t >= first
            g = gradients[i].to(carry.dtype) + carry
            kept = g
            before = befores[i].to(carry.dtype)
            if HAS_H0:
                before = tl.where(t == 0, start, before)
            if HAS_STARTS:
                kept = tl.where(resets[i], 0.0, g)
                before = tl.where(resets[i], 0.0, before)
            if GATED:
                sum_a += tl.where(inside, kept * before, 0.0)
                s = tl.sigmoid(xs[i].to(carry.dtype))
                v = ys[i].to(carry.dtype)
                gs = g * s
                sum_b += tl.where(inside, gs * v, 0.0)
                to_x = gs * scale * v * (1.0 - s)
                to_y = gs * scale
            else:
                decay = ys[i].to(carry.dtype)
                to_x = g
                to_y = g * before
            carry = tl.where(inside, decay * kept, carry)
            place = _at(dx, t, n, states, PAIRED)
            tl.store(place, to_x.to(dx.dtype.element_ty), mask=exists & inside)
            place = _at(dy, t, n, states, PAIRED)
            tl.store(place, to_y.to(dy.dtype.element_ty), mask=exists & inside)
    if GATED:
        tl.store(da + part, sum_a, mask=exists)
        tl.store(db + part, sum_b, mask=exists)
    tl.store(dh0 + sequence * n + states, carry, mask=exists & (chunk == 0))
