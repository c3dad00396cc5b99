"""The linear scan in Triton: that of `gated_scan.triton_kernels` with a decay for every step.

There the passes over chunks are explained, and the flags. A decay of zero after a start makes P no
number in place of infinite, which `combine` takes for nothing kept too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pha.ops.gated_scan.triton_kernels import _at, _flag, _place, _row


@triton.jit(do_not_specialize=["T", "chunks", "length"])
def forward(
    u,
    u_B,
    u_T,
    a,
    a_B,
    a_T,
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
):
    """Write h (B, T, n) and `last` (B, n); a SUMMARY writes L and P (B, chunks, n) instead.

    `initial` (B, chunks, n) is the state before each chunk.
    """
    sequence, chunk, states, exists = _place(n, chunks, BLOCK, PAIRED)
    first = chunk * length
    end = tl.minimum(first + length, T)
    u += sequence * u_B
    a += sequence * a_B
    starts += sequence * T
    h += sequence * T * n
    summary = (sequence * chunks + chunk) * n + states
    state = tl.zeros([BLOCK], last.dtype.element_ty)
    if HAS_INITIAL:
        state = tl.load(initial + summary, mask=exists, other=0.0)
    kept = tl.zeros([BLOCK], last.dtype.element_ty) + 1.0
    for t0 in tl.range(first, end, UNROLL, num_stages=STAGES):
        inputs, decays, resets = (), (), ()
        for i in tl.static_range(UNROLL):
            inside = t0 + i < end
            inputs += (_row(u, t0 + i, u_T, states, exists & inside, PAIRED),)
            decays += (_row(a, t0 + i, a_T, states, exists & inside, PAIRED),)
            resets += (_flag(starts, t0 + i, inside, HAS_STARTS),)
        for i in tl.static_range(UNROLL):
            inside = t0 + i < end
            decay = decays[i].to(state.dtype)
            before = state
            if HAS_STARTS:
                before = tl.where(resets[i], 0.0, state)
            state = tl.where(inside, decay * before + inputs[i].to(state.dtype), state)
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
def backward(
    dh,
    dh_B,
    dh_T,
    incoming,
    h,
    a,
    a_B,
    a_T,
    h0,
    starts,
    du,
    da,
    dh0,
    product,
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
    SUMMARY: tl.constexpr,
):
    """Write du, da (B, T, n) and dh0 (B, n).

    `incoming` (B, chunks, n) is the gradient that reaches the last state of each chunk from later.
    A SUMMARY writes instead, to `dh0` and `product` (B, chunks, n), the L and P of the gradient
    that leaves each chunk at its beginning.
    """
    sequence, chunk, states, exists = _place(n, chunks, BLOCK, PAIRED)
    first = chunk * length
    end = tl.minimum(first + length, T)
    dh += sequence * dh_B
    a += sequence * a_B
    starts += sequence * T
    h += sequence * T * n
    du += sequence * T * n
    da += sequence * T * n
    part = (sequence * chunks + chunk) * n + states
    carry = tl.zeros([BLOCK], dh0.dtype.element_ty)
    if not SUMMARY:
        carry = tl.load(incoming + part, mask=exists, other=0.0)
    kept = tl.zeros([BLOCK], dh0.dtype.element_ty) + 1.0
    start = tl.zeros([BLOCK], dh0.dtype.element_ty)
    if HAS_H0:
        start = tl.load(h0 + sequence * n + states, mask=exists, other=0.0)
    for back in tl.range(0, end - first, UNROLL, num_stages=STAGES):
        t0 = end - 1 - back
        gradients, befores, decays, resets = (), (), (), ()
        for i in tl.static_range(UNROLL):
            t = t0 - i
            inside = t >= first
            gradients += (_row(dh, t, dh_T, states, exists & inside, PAIRED),)
            decays += (_row(a, t, a_T, states, exists & inside, PAIRED),)
            resets += (_flag(starts, t, inside, HAS_STARTS),)
            if not SUMMARY:
                befores += (_row(h, t - 1, n, states, exists & inside & (t > 0), PAIRED),)
        for i in tl.static_range(UNROLL):
            t = t0 - i
            inside = t >= first
            decay = decays[i].to(carry.dtype)
            g = gradients[i].to(carry.dtype) + carry
            back_on = g
            if HAS_STARTS:
                back_on = tl.where(resets[i], 0.0, g)
            if SUMMARY:
                kept = tl.where(inside, kept * decay, kept)
                if HAS_STARTS:
                    kept = tl.where(resets[i], float("inf"), kept)
            else:
                before = befores[i].to(carry.dtype)
                if HAS_H0:
                    before = tl.where(t == 0, start, before)
                if HAS_STARTS:
                    before = tl.where(resets[i], 0.0, before)
                place = _at(du, t, n, states, PAIRED)
                tl.store(place, g.to(du.dtype.element_ty), mask=exists & inside)
                place = _at(da, t, n, states, PAIRED)
                tl.store(place, (g * before).to(da.dtype.element_ty), mask=exists & inside)
            carry = tl.where(inside, decay * back_on, carry)
    if SUMMARY:
        tl.store(dh0 + part, carry, mask=exists)
        tl.store(product + part, kept, mask=exists)
    else:
        tl.store(dh0 + sequence * n + states, carry, mask=exists & (chunk == 0))
