"""One token of a whole model as one compiled call: a list of instructions on rows of numbers.

Decoding with a small batch reads every weight once and does little else, so what counts is the
rate of reading. Every thread runs all instructions and does its share of each; where one needs
what others wrote, all wait for each other. There is no call, and no allocation, per layer.

An instruction is a row of `FIELDS` integers. Numbers live in `work`, one row for each sequence, in
float32; what does not change from token to token is in `constants`. Weights, keys, values and
states stay where they are and are found by address.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from pha.decoder import instructions as op
from pha.decoder.elements import exp32, expm1_32, jit_sum, narrow, sigmoid, widen
from pha.model.gss import GROUP

SPINS = 4000  # looks at the others before giving the processor away
_yield_processor = types.ExternalFunction("sched_yield", types.int32())
_TINY, _ZERO, _ONE, _TWO = (np.float32(x) for x in (1e-12, 0, 1, 2))
_LEAST = np.float32(-np.inf)


@intrinsic
def _pointer(context: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to elements like those of the array `like`."""
    pointer = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@intrinsic
def _add_one(context: Any, counter: Any) -> Any:
    """Add one to the first element of an int64 array, seen by all threads; return the new value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(counter)(context, builder, args[0])
        one = ir.Constant(ir.IntType(64), 1)
        return builder.add(builder.atomic_rmw("add", array.data, one, "seq_cst"), one)

    return types.int64(counter), generate


@intrinsic
def _look(context: Any, counter: Any) -> Any:
    """The first element of an int64 array, as other threads left it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(counter)(context, builder, args[0])
        return builder.load_atomic(array.data, "seq_cst", 8)

    return types.int64(counter), generate


@jit_sum
def _wait(counter: Any, target: int) -> None:
    """Until all threads are here: `target` arrivals since the beginning."""
    if _add_one(counter) >= target:
        return
    spins = 0
    while _look(counter) < target:
        spins += 1
        if spins > SPINS:
            _yield_processor()


@jit_sum
def _slice(x: Any, begin: int, size: int) -> Any:
    """The numbers from `begin` on. Loops over slices are vectorised, those over offsets are not:
    the compiler cannot tell that an offset is not negative."""
    return x[begin : begin + size]


@jit_sum
def _dot(row: Any, x: Any) -> Any:
    total = _ZERO
    for i in range(row.size):
        total += widen(row[i]) * x[i]
    return total


@jit_sum
def _four_dots(rows: Any, x: Any) -> Any:
    """Four rows times x, which is read once."""
    size = x.size
    first, second = _slice(rows, 0, size), _slice(rows, size, size)
    third, fourth = _slice(rows, 2 * size, size), _slice(rows, 3 * size, size)
    a = b = c = d = _ZERO
    for i in range(size):
        a += widen(first[i]) * x[i]
        b += widen(second[i]) * x[i]
        c += widen(third[i]) * x[i]
        d += widen(fourth[i]) * x[i]
    return a, b, c, d


@jit_sum
def _linear(step: Any, work: Any, width: int, batch: int, part: int, parts: int, like: Any) -> None:
    """Rows of a weight (SIZE, INNER) times each sequence."""
    size, inner = step[op.SIZE], step[op.INNER]
    low, high = size * part // parts, size * (part + 1) // parts
    weight = carray(_pointer(step[op.ADDRESS], like), (size * inner,))
    # More sequences than fit the first-level cache with a row: read them once for four rows.
    whole = low + (high - low) // 4 * 4 if batch > 4 else low
    for j in range(low, whole, 4):
        for b in range(batch):
            x = _slice(work, b * width + step[op.SOURCE], inner)
            at = b * width + step[op.TARGET] + j
            sums = _four_dots(_slice(weight, j * inner, 4 * inner), x)
            for i in range(4):
                work[at + i] = sums[i]
    for j in range(whole, high):
        row = _slice(weight, j * inner, inner)
        for b in range(batch):
            x = _slice(work, b * width + step[op.SOURCE], inner)
            work[b * width + step[op.TARGET] + j] = _dot(row, x)


@jit_sum
def _norm(step: Any, work: Any, width: int, b: int, constants: Any) -> None:
    """to = [to +] w x / rms(x) * gain; with FIRST = w and SECOND = eps in `constants`."""
    size = step[op.SIZE]
    x = _slice(work, b * width + step[op.SOURCE], size)
    to = _slice(work, b * width + step[op.TARGET], size)
    gain = _slice(constants, step[op.AUX], size)
    scale = constants[step[op.FIRST]] / np.sqrt(
        _dot(x, x) / np.float32(size) + constants[step[op.SECOND]]
    )
    for i in range(size):
        to[i] = (to[i] if step[op.FLAG] else _ZERO) + x[i] * scale * gain[i]


@jit_sum
def _add(step: Any, work: Any, width: int, b: int, constants: Any) -> None:
    """to = FIRST to + SECOND x."""
    x = _slice(work, b * width + step[op.SOURCE], step[op.SIZE])
    to = _slice(work, b * width + step[op.TARGET], step[op.SIZE])
    first, second = constants[step[op.FIRST]], constants[step[op.SECOND]]
    for i in range(x.size):
        to[i] = first * to[i] + second * x[i]


@jit_sum
def _gate(
    step: Any, work: Any, width: int, batch: int, part: int, parts: int, constants: Any
) -> None:
    """A step of Eq. 2: h = a h + b sigmoid(gate) value, for the same states as `_linear` made."""
    size = step[op.SIZE]
    low = size * part // parts
    count = size * (part + 1) // parts - low
    states = carray(_pointer(step[op.ADDRESS], work), (batch * size,))
    a = _slice(constants, step[op.FIRST] + low, count)
    scale = _slice(constants, step[op.SECOND] + low, count)
    for b in range(batch):
        gate = _slice(work, b * width + step[op.SOURCE] + low, count)
        value = _slice(work, b * width + step[op.AUX] + low, count)
        h = _slice(states, b * size + low, count)
        to = _slice(work, b * width + step[op.TARGET] + low, count)
        for i in range(count):
            h[i] = a[i] * h[i] + scale[i] * sigmoid(gate[i]) * value[i]
        for i in range(count):
            to[i] = h[i]


@jit_sum
def _forget(
    step: Any, work: Any, width: int, batch: int, part: int, parts: int, constants: Any
) -> None:
    """`_gate` with a time step for each group of states: the softplus of AUX2 plus SECOND.

    FIRST is -A in `constants`; b is 1 - a with FLAG, else sqrt(1 - a^2).
    """
    size = step[op.SIZE]
    low, high = size * part // parts, size * (part + 1) // parts
    states = carray(_pointer(step[op.ADDRESS], work), (batch * size,))
    for b in range(batch):
        row = b * width
        for group in range(low // GROUP, -(-high // GROUP)):
            begin, end = max(low, group * GROUP), min(high, (group + 1) * GROUP)
            x = work[row + step[op.AUX2] + group] + constants[step[op.SECOND] + group]
            # log(1 + exp(x)), which is x where that overflows
            dt = max(x, _ZERO) + np.log1p(exp32(-abs(x)))
            count = end - begin
            rate = _slice(constants, step[op.FIRST] + begin, count)
            gate = _slice(work, row + step[op.SOURCE] + begin, count)
            value = _slice(work, row + step[op.AUX] + begin, count)
            h = _slice(states, b * size + begin, count)
            to = _slice(work, row + step[op.TARGET] + begin, count)
            for i in range(count):
                lost = expm1_32(dt * rate[i])  # a - 1
                scale = -lost if step[op.FLAG] else np.sqrt(-lost * (_TWO + lost))
                h[i] = (_ONE + lost) * h[i] + scale * sigmoid(gate[i]) * value[i]
            for i in range(count):
                to[i] = h[i]


@jit_sum
def _swiglu(step: Any, work: Any, width: int, batch: int, part: int, parts: int) -> None:
    """to = silu(gate) * up, for the same entries as `_linear` made."""
    size = step[op.SIZE]
    low = size * part // parts
    count = size * (part + 1) // parts - low
    for b in range(batch):
        gate = _slice(work, b * width + step[op.SOURCE] + low, count)
        up = _slice(work, b * width + step[op.AUX] + low, count)
        to = _slice(work, b * width + step[op.TARGET] + low, count)
        for i in range(count):
            to[i] = gate[i] * sigmoid(gate[i]) * up[i]


@jit_sum
def _head(step: Any, x: Any, scale: Any, angles: Any) -> None:
    """Normalise (with FLAG), scale and turn one head x of INNER numbers, in place."""
    half = x.size // 2
    if step[op.FLAG]:
        scale = scale / max(np.sqrt(_dot(x, x)), _TINY)
    for i in range(half):
        cos, sin = angles[i], angles[half + i]
        x1, x2 = x[i] * scale, x[half + i] * scale
        x[i] = x1 * cos - x2 * sin
        x[half + i] = x2 * cos + x1 * sin


@jit_sum
def _append(
    step: Any, work: Any, width: int, unit: int, place: int, capacity: int, like: Any
) -> None:
    """A key and a value of one head (SOURCE, AUX) to their place in the cache (ADDRESS, AUX2)."""
    heads, inner = step[op.SIZE], step[op.INNER]
    b, head = unit // heads, unit % heads
    for source, address in ((step[op.SOURCE], step[op.ADDRESS]), (step[op.AUX], step[op.AUX2])):
        x = _slice(work, b * width + source + head * inner, inner)
        at = (unit * capacity + place) * inner
        kept = _slice(carray(_pointer(address, like), (at + inner,)), at, inner)
        for i in range(inner):
            kept[i] = narrow(x[i], kept[i])


@jit_sum
def _attend(
    step: Any,
    work: Any,
    width: int,
    unit: int,
    first: int,
    last: int,
    capacity: int,
    scores: Any,
    like: Any,
) -> None:
    """One query head against the keys `first` to `last` of the cache; AUX key heads."""
    heads, inner = step[op.SIZE], step[op.INNER]
    b, head = unit // heads, unit % heads
    begin = (b * step[op.AUX] + head * step[op.AUX] // heads) * capacity * inner
    end = begin + last * inner
    keys = carray(_pointer(step[op.ADDRESS], like), (end,))
    values = carray(_pointer(step[op.AUX2], like), (end,))
    query = _slice(work, b * width + step[op.SOURCE] + head * inner, inner)
    to = _slice(work, b * width + step[op.TARGET] + head * inner, inner)
    largest = _LEAST
    for s in range(first, last):
        scores[s] = _dot(_slice(keys, begin + s * inner, inner), query)
        largest = max(largest, scores[s])
    mass = _ZERO
    for s in range(first, last):
        scores[s] = exp32(scores[s] - largest)
        mass += scores[s]
    to[:] = _ZERO
    for s in range(first, last):
        weight = scores[s] / mass
        row = _slice(values, begin + s * inner, inner)
        for i in range(inner):
            to[i] += weight * widen(row[i])


@jit_sum
def run(
    part: int,
    parts: int,
    batch: int,
    place: int,
    capacity: int,
    steps: Any,
    constants: Any,
    work: Any,
    rotary: Any,
    starts: Any,
    counter: Any,
    logits: Any,
) -> None:
    """Do the share `part` of `parts` of every instruction.

    Args:
        part: which thread this is.
        parts: how many there are.
        batch: B.
        place: of the new token in the cache.
        capacity: places that the cache has.
        steps: (instructions, FIELDS) int64.
        constants: float32.
        work: (B x width,) float32.
        rotary: (B x K,) cosines, then sines, of each sequence.
        starts: (B,) int64, the first place that each sequence attends to.
        counter: (1,) int64 of zero, shared by the threads.
        logits: (B x V,), of the elements of weights, keys and values; the last instruction makes
            them, in `work`.
    """
    like = logits
    width = work.size // batch
    scores = np.empty(place + 1, np.float32)
    waits = 0
    for number in range(steps.shape[0]):
        step = steps[number]
        kind = step[op.OP]
        if kind == op.LINEAR:
            _linear(step, work, width, batch, part, parts, like)
        elif kind == op.GATE:
            _gate(step, work, width, batch, part, parts, constants)
        elif kind == op.FORGET:
            _forget(step, work, width, batch, part, parts, constants)
        elif kind == op.SWIGLU:
            _swiglu(step, work, width, batch, part, parts)
        elif kind == op.NORM:
            for b in range(part, batch, parts):
                _norm(step, work, width, b, constants)
        elif kind == op.ADD:
            for b in range(part, batch, parts):
                _add(step, work, width, b, constants)
        else:
            heads = step[op.SIZE]
            for unit in range(part, batch * heads, parts):
                b, head = unit // heads, unit % heads
                if kind == op.HEADS:
                    inner = step[op.INNER]
                    x = _slice(work, b * width + step[op.SOURCE] + head * inner, inner)
                    angles = _slice(rotary, b * inner, inner)
                    _head(step, x, constants[step[op.FIRST] + head], angles)
                elif kind == op.APPEND:
                    _append(step, work, width, unit, place, capacity, like)
                elif kind == op.ATTEND:
                    _attend(step, work, width, unit, starts[b], place + 1, capacity, scores, like)
        if step[op.WAIT] and parts > 1:
            waits += 1
            _wait(counter, waits * parts)
    # Each thread rounds what it made itself. Left to torch, this would wake threads of its own,
    # which go on spinning while the next token is waiting for a processor.
    size = logits.size // batch
    low = size * part // parts
    count = size * (part + 1) // parts - low
    for b in range(batch):
        made = _slice(work, b * width + steps[-1, op.TARGET] + low, count)
        given = _slice(logits, b * size + low, count)
        for i in range(count):
            given[i] = narrow(made[i], given[i])


@jit_sum
def same(addresses: Any, sizes: Any, kept: Any) -> bool:
    """Whether the bytes at each address, as many as its size, are those that lie in `kept`."""
    at = 0
    for i in range(addresses.size):
        here = carray(_pointer(addresses[i], kept), (sizes[i],))
        there = _slice(kept, at, sizes[i])
        different = 0
        for j in range(here.size):
            different |= here[j] ^ there[j]
        if different:
            return False
        at += sizes[i]
    return True


def signature(name: str, element: Any) -> Any:
    """The types of the arguments of `run`, for weights of `element`, or of `same`."""
    real, whole = types.Array(types.float32, 1, "C"), types.Array(types.int64, 1, "C")
    if name == "same":
        return types.boolean(whole, whole, types.Array(types.uint8, 1, "C"))
    steps = types.Array(types.int64, 2, "C")
    return types.void(
        *[types.int64] * 5,
        *(steps, real, real, real, whole, whole, types.Array(element, 1, "C")),
    )
