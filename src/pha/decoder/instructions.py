"""What an instruction of the compiled kernel consists of, apart from the kernel, which needs numba.

An instruction is a row of `FIELDS` integers.
"""

FIELDS = 12
OP, WAIT, TARGET, SOURCE, SIZE, INNER, ADDRESS, AUX, AUX2, FIRST, SECOND, FLAG = range(FIELDS)
LINEAR, NORM, ADD, GATE, FORGET, SWIGLU, HEADS, APPEND, ATTEND = range(9)
