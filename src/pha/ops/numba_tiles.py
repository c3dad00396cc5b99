"""Products of small matrices in registers: the one step of blocked kernels that loops cannot say.

A tile of C, some rows by some vectors of 16 columns, stays in registers while it sums up
C[r, j] += sum_p A[r, p] B[p, j]. The operands consist of words of 32 bits: float32 numbers, or, as
uint32, pairs of bfloat16 that are adjacent along p, of which one instruction multiplies 32 and adds
them to 16 sums in float32. B has its columns adjacent; the words of A may lie anywhere in strides.

numba compiles for the processor at hand, which must have these instructions: see `supported`.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pha.ops.numba_math import C2, C3, C4, C5, C6, LN2_HIGH, LN2_LOW, LOG2_E, SHIFT

LANES = 16
UNROLLED = 4  # Vectors at a time in loops over a row, whose length is a multiple of them.
_FLOAT, _WORD, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_SUMS = ir.VectorType(_FLOAT, LANES)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


@functools.cache
def supported(bfloat16: bool) -> bool:
    """Whether the processor that numba compiles for multiplies vectors of 512 bits."""
    from llvmlite import binding
    from numba import config

    if config.CPU_NAME or config.CPU_FEATURES:  # not the processor at hand
        return False
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f")) and (not bfloat16 or bool(features.get("avx512bf16")))


def _fused(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """total + a b, lane by lane: of numbers, or of pairs of bfloat16."""
    if a.type.element == _FLOAT:
        name, operands = "llvm.fma.v16f32", (a, b, total)
        kinds = [_SUMS, _SUMS, _SUMS]
    else:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        operands = total, builder.bitcast(a, _PAIRS), builder.bitcast(b, _PAIRS)
        kinds = [_SUMS, _PAIRS, _PAIRS]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_SUMS, kinds), name)
    return builder.call(function, operands)


def _address(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(base, [index]), ir.PointerType(kind))


def _product(accumulate: bool) -> Any:
    """Code for one tile, whose size is in the types of the last two arguments."""

    def typed(
        context: Any,
        c: Any,
        c_at: Any,
        c_row: Any,
        a: Any,
        a_at: Any,
        a_row: Any,
        a_step: Any,
        b: Any,
        b_at: Any,
        b_row: Any,
        depth: Any,
        rows: Any,
        vectors: Any,
    ) -> Any:
        height, width = rows.count, vectors.count
        integers = [types.int64] * 2
        signature = types.void(
            c, *integers, a, *integers, types.int64, b, *integers, types.int64, rows, vectors
        )

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            c_at, c_row, a_at, a_row, a_step, b_at, b_row, depth = (
                args[i] for i in (1, 2, 4, 5, 6, 8, 9, 10)
            )
            c_data, a_data, b_data = (
                context.make_array(signature.args[i])(context, builder, args[i]).data
                for i in (0, 3, 7)
            )
            word = context.get_data_type(signature.args[3].dtype)
            vector = ir.VectorType(word, LANES)
            places = []
            for r in range(height):
                row = builder.add(c_at, builder.mul(c_row, _INDEX(r)))
                places += [
                    _address(builder, c_data, builder.add(row, _INDEX(LANES * j)), _SUMS)
                    for j in range(width)
                ]
            if accumulate:
                first = [builder.load(place, align=4) for place in places]
            else:
                first = [ir.Constant(_SUMS, [0.0] * LANES)] * len(places)
            shifts = [builder.mul(a_row, _INDEX(r)) for r in range(height)]
            before = builder.block
            loop = builder.append_basic_block("depth")
            after = builder.append_basic_block("stored")
            builder.branch(loop)
            builder.position_at_end(loop)
            p = builder.phi(_INDEX)
            sums = [builder.phi(_SUMS) for _ in first]
            b_p = builder.add(b_at, builder.mul(p, b_row))
            b_vectors = [
                builder.load(
                    _address(builder, b_data, builder.add(b_p, _INDEX(LANES * j)), vector), align=4
                )
                for j in range(width)
            ]
            a_p = builder.add(a_at, builder.mul(p, a_step))
            results = []
            undefined = ir.Constant(vector, ir.Undefined)
            everywhere = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
            for r in range(height):
                x = builder.load(builder.gep(a_data, [builder.add(a_p, shifts[r])]))
                x = builder.insert_element(undefined, x, _WORD(0))
                x = builder.shuffle_vector(x, undefined, everywhere)
                results += [
                    _fused(builder, x, b_vectors[j], sums[r * width + j]) for j in range(width)
                ]
            following = builder.add(p, _INDEX(1))
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
            p.add_incoming(_INDEX(0), before)
            p.add_incoming(following, loop)
            for total, initial, result in zip(sums, first, results, strict=True):
                total.add_incoming(initial, before)
                total.add_incoming(result, loop)
            builder.position_at_end(after)
            for place, result in zip(places, results, strict=True):
                builder.store(result, place, align=4)
            return context.get_dummy_value()

        return signature, code

    return typed


# C = A B and C += A B for one tile; depth is at least 1.
multiply = intrinsic(_product(False))
multiply_add = intrinsic(_product(True))


def _constant(value: Any) -> Any:
    return ir.Constant(_SUMS, [float(value)] * LANES)


def _weight(builder: Any, x: Any) -> Any:
    """exp(x) of 16 numbers x <= 0 as in `numba_math.exp32`; zero where it would be denormal."""
    contract = ("contract",)
    fma = functools.partial(_fused, builder)
    shifted = fma(x, _constant(LOG2_E), _constant(SHIFT))
    k = builder.fsub(shifted, _constant(SHIFT))
    r = fma(k, _constant(-LN2_HIGH), x)
    r = fma(k, _constant(-LN2_LOW), r)
    p = _constant(C6)
    for coefficient in (C5, C4, C3, C2):
        p = fma(r, p, _constant(coefficient))
    p = fma(builder.fmul(r, r, contract), p, builder.fadd(r, _constant(1)))
    words = ir.VectorType(_WORD, LANES)
    exponent = builder.shl(builder.bitcast(shifted, words), ir.Constant(words, [23] * LANES))
    power = builder.bitcast(builder.add(builder.bitcast(p, words), exponent), _SUMS)
    too_low = builder.fcmp_ordered("<", x, _constant(-87.0))
    return builder.select(too_low, _constant(0), power)


def _stored(builder: Any, data: Any, index: Any, x: Any) -> None:
    """Round 16 numbers to the elements of an array: float32, or uint16 for bfloat16."""
    if data.type.pointee == _FLOAT:
        builder.store(x, _address(builder, data, index, _SUMS), align=4)
    else:
        narrow = ir.VectorType(_BFloat(), LANES)
        builder.store(builder.fptrunc(x, narrow), _address(builder, data, index, narrow), align=2)


def _loop(builder: Any, width: Any, first: list[Any], body: Any) -> list[Any]:
    """Carry vectors through body(j, carried) for j = 0, UNROLLED * LANES, ... < width."""
    before, loop = builder.block, builder.append_basic_block("columns")
    after = builder.append_basic_block("row")
    builder.branch(loop)
    builder.position_at_end(loop)
    j, carried = builder.phi(_INDEX), [builder.phi(x.type) for x in first]
    results = body(j, carried)
    following = builder.add(j, _INDEX(UNROLLED * LANES))
    builder.cbranch(builder.icmp_signed("<", following, width), loop, after)
    for phi, initial, result in zip(
        [j, *carried], [_INDEX(0), *first], [following, *results], strict=True
    ):
        phi.add_incoming(initial, before)
        phi.add_incoming(result, builder.block)
    builder.position_at_end(after)
    return results


def _reduced(builder: Any, operation: str, *operands: Any) -> Any:
    kinds = [x.type for x in operands]
    name = f"llvm.vector.reduce.{operation}.v16f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOAT, kinds), name)
    return builder.call(function, operands, fastmath=("reassoc",) if operation == "fadd" else ())


def _spread(builder: Any, x: Any) -> Any:
    """A number in all lanes."""
    one = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), x, _WORD(0))
    everywhere = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
    return builder.shuffle_vector(one, one, everywhere)


@intrinsic
def row_maximum(context: Any, s: Any, at: Any, width: Any, least: Any) -> Any:
    """The largest of `least` and s[at : at + width]; NaN is passed over."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data

        def body(j: Any, tops: list[Any]) -> list[Any]:
            results = []
            for i, top in enumerate(tops):
                index = builder.add(builder.add(args[1], j), _INDEX(i * LANES))
                x = builder.load(_address(builder, data, index, _SUMS), align=4)
                results.append(builder.select(builder.fcmp_ordered(">", x, top), x, top))
            return results

        tops = _loop(builder, args[2], [_spread(builder, args[3])] * UNROLLED, body)
        while len(tops) > 1:
            x, y, *tops = tops
            tops.append(builder.select(builder.fcmp_ordered(">", x, y), x, y))
        return _reduced(builder, "fmax", tops[0])

    return types.float32(s, types.int64, types.int64, types.float32), code


@intrinsic
def row_weights(context: Any, s: Any, at: Any, width: Any, top: Any, p: Any, p_at: Any) -> Any:
    """Store exp(s - top) in p for a row of `width` scores, rounded; return the sum before that."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, weights = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 4)
        )
        top = _spread(builder, args[3])

        def body(j: Any, sums: list[Any]) -> list[Any]:
            results = []
            for i, total in enumerate(sums):
                column = builder.add(j, _INDEX(i * LANES))
                place = _address(builder, data, builder.add(args[1], column), _SUMS)
                x = _weight(builder, builder.fsub(builder.load(place, align=4), top))
                _stored(builder, weights, builder.add(args[5], column), x)
                results.append(builder.fadd(total, x))
            return results

        sums = _loop(builder, args[2], [_constant(0)] * UNROLLED, body)
        while len(sums) > 1:
            x, y, *sums = sums
            sums.append(builder.fadd(x, y))
        return _reduced(builder, "fadd", _FLOAT(0.0), sums[0])

    return types.float32(s, types.int64, types.int64, types.float32, p, types.int64), code


def _store_pair(builder: Any, data: Any, index: Any, row: Any, x: Any, y: Any) -> None:
    """Store columns of two adjacent rows x and y as words of a left operand, `row` apart."""
    if data.type.pointee == _FLOAT:
        builder.store(x, _address(builder, data, index, _SUMS), align=4)
        builder.store(y, _address(builder, data, builder.add(index, row), _SUMS), align=4)
        return
    words, halves = ir.VectorType(_WORD, LANES), ir.VectorType(ir.IntType(16), LANES)
    low, high = (
        builder.zext(
            builder.bitcast(builder.fptrunc(z, ir.VectorType(_BFloat(), LANES)), halves), words
        )
        for z in (x, y)
    )
    high = builder.shl(high, ir.Constant(words, [16] * LANES))
    builder.store(builder.or_(low, high), _address(builder, data, index, words), align=4)


@intrinsic
def pair_gradients(
    context: Any,
    s: Any,
    dp: Any,
    at: Any,
    row: Any,
    width: Any,
    lse: Any,
    delta: Any,
    first: Any,
    p: Any,
    ds: Any,
    pair_at: Any,
    left: Any,
    left_at: Any,
) -> Any:
    """p = exp(s - lse) and ds = p (dp - delta) of two rows, `row` apart in s, dp and `left`.

    p and ds hold words of the two rows, for sums over rows; `left` holds ds by rows, for sums over
    columns. lse and delta of the rows are at `first` and after it.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def data(i: int) -> Any:
            return context.make_array(signature.args[i])(context, builder, args[i]).data

        scores, gradients, p_data, ds_data, left_data = (data(i) for i in (0, 1, 8, 9, 11))
        at, row, pair_at, left_at = (args[i] for i in (2, 3, 10, 12))
        shifts, deltas = (
            [
                _spread(
                    builder,
                    builder.load(builder.gep(data(i), [builder.add(args[7], _INDEX(r))])),
                )
                for r in range(2)
            ]
            for i in (5, 6)
        )

        def body(j: Any, carried: list[Any]) -> list[Any]:
            for i in range(UNROLLED):
                column = builder.add(j, _INDEX(i * LANES))
                weights, results = [], []
                for r in range(2):
                    ahead = builder.add(column, builder.mul(row, _INDEX(r)))
                    index = builder.add(at, ahead)
                    x, y = (
                        builder.load(_address(builder, z, index, _SUMS), align=4)
                        for z in (scores, gradients)
                    )
                    weights.append(_weight(builder, builder.fsub(x, shifts[r])))
                    results.append(builder.fmul(weights[r], builder.fsub(y, deltas[r])))
                    _stored(builder, left_data, builder.add(left_at, ahead), results[r])
                index = builder.add(pair_at, column)
                _store_pair(builder, p_data, index, row, *weights)
                _store_pair(builder, ds_data, index, row, *results)
            return []

        _loop(builder, args[4], [], body)
        return context.get_dummy_value()

    integer = types.int64
    return (
        types.void(
            *(s, dp, integer, integer, integer, lse, delta, integer),
            *(p, ds, integer, left, integer),
        ),
        code,
    )
