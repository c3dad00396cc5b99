"""Elements and elementary functions of the compiled kernel; imported at first use.

bfloat16 tensors come as uint16. They are widened when read and rounded to nearest even when
written. What is here is inlined, without calls, so that the loops around it are vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Multiplication and addition may be fused; nothing else of IEEE arithmetic is given up.
jit = njit(nogil=True, error_model="numpy", fastmath={"contract"}, boundscheck=False)
# Sums may besides be taken in any order, the same each time, which makes vectors of them.
jit_sum = njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"}, boundscheck=False)
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)


@intrinsic
def widen(context: Any, x: Any) -> Any:
    """The number that an element stands for: float32 of bfloat16 bits, others as they are."""

    def float_from_bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.zext(args[0], _INT), ir.Constant(_INT, 16))
        return builder.bitcast(bits, _FLOAT)

    def same(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return (types.float32(x), float_from_bits) if x == types.uint16 else (x(x), same)


@intrinsic
def narrow(context: Any, x: Any, like: Any) -> Any:
    """The element that stands for the number x in an array of elements like `like`."""

    def bits_from_float(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(_INT, value)

        bits = builder.bitcast(args[0], _INT)
        upper = builder.lshr(bits, constant(16))
        # Half a unit, less one bit where the upper half is even: ties go to the even one.
        half = builder.add(builder.and_(upper, constant(1)), constant(0x7FFF))
        rounded = builder.lshr(builder.add(bits, half), constant(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        rounded = builder.select(is_nan, builder.or_(upper, constant(0x40)), rounded)
        return builder.trunc(rounded, ir.IntType(16))

    def same(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return (like(x, like), bits_from_float) if like == types.uint16 else (x(x, like), same)


@intrinsic
def _times_power_of_two(context: Any, x: Any, shifted: Any) -> Any:
    """x * 2^k in float32, where `shifted` is k + SHIFT: k sits in its lowest bits."""

    def add_to_exponent(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, k = (builder.bitcast(value, _INT) for value in args)
        return builder.bitcast(builder.add(bits, builder.shl(k, ir.Constant(_INT, 23))), _FLOAT)

    return x(x, shifted), add_to_exponent


SHIFT = np.float32(1.5 * 2**23)  # Adding it rounds to a whole number.
LOG2_E = np.float32(np.log2(np.e))
# ln 2 in two parts; k times the first, of 12 bits, is exact.
LN2_HIGH = np.float32(np.floor(np.log(2) * 2**12) / 2**12)
LN2_LOW = np.float32(np.log(2) - np.floor(np.log(2) * 2**12) / 2**12)
# Beyond these 2^k would leave the normal float32 numbers.
LOWEST, HIGHEST = np.float32(-87.3), np.float32(88.3)
# (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, interpolated in Chebyshev nodes.
C2 = np.float32(0.5)
C3 = np.float32(0.16666576266288757)
C4 = np.float32(0.041666556149721146)
C5 = np.float32(0.008363178931176662)
C6 = np.float32(0.0013926184037700295)
_ONE = np.float32(1.0)


@jit
def _reduced(x: Any) -> Any:
    """exp(r) - 1 and k + SHIFT, where x = k ln 2 + r, so that exp(x) = 2^k exp(r)."""
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    shifted = x * LOG2_E + SHIFT
    k = shifted - SHIFT
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = C2 + r * (C3 + r * (C4 + r * (C5 + r * C6)))
    return r + r * r * p, shifted


@jit
def exp32(x: Any) -> Any:
    """exp(x) in float32 without a call, so that loops over it are vectorised.

    Right to 2 units in the last place in [-87.3, 88.3], and what it is at the nearer end outside.
    """
    less_one, shifted = _reduced(x)
    return _times_power_of_two(_ONE + less_one, shifted)


@jit
def expm1_32(x: Any) -> Any:
    """exp(x) - 1 in float32, as exact near 0 as elsewhere; for x as in `exp32`."""
    less_one, shifted = _reduced(x)
    power = _times_power_of_two(_ONE, shifted)
    return (power - _ONE) + power * less_one


@jit
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) in float32."""
    return _ONE / (_ONE + exp32(-x))
