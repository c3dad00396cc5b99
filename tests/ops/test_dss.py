"""The diagonal state space of Mehta et al.: every backend against the oracle and closed forms."""

from __future__ import annotations

import cmath
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, dss
from pha.ops.dss import _powers
from tests.ops.common import (
    Function,
    Inputs,
    converted,
    cpu_backends,
    gradcheck,
    in_pieces,
    is_rounded_once,
    magnitudes,
    outcome,
    starts_of,
    worst,
)

BACKENDS = cpu_backends("dss")
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 5), (1, 2, 3, 16), (2, 63, 5, 17), (4, 7, 3, 9), (3, 500, 5, 7)]
KINDS = ["none", "first", "consecutive", "random", "all"]
EPS32 = torch.finfo(torch.float32).eps

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def backend_function(name: str) -> Function:
    return OPS["dss"].backends[name]


def problem(
    B: int,
    T: int,
    H: int,
    N: int,
    starts: str = "none",
    with_h0: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Inputs by name. Modes forget within one to a thousand steps, at any frequency."""
    generator = torch.Generator().manual_seed(1000 * B + 10 * T + N)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(state_dtype)

    rates = torch.logspace(-3, 0, N)
    angles = math.pi * (0.02 + torch.rand(N, generator=generator))
    inputs = {
        "v": normal(B, T, H).to(dtype),
        "Lambda_re": rates.log().to(state_dtype),
        "Lambda_im": angles.log().to(state_dtype),
        "C_re": normal(H, N),
        "C_im": normal(H, N),
        "D": normal(H),
        "h0": normal(B, H, N, 2),
    }
    if not with_h0:
        del inputs["h0"]
    if starts != "none":
        inputs["starts"] = make_starts(starts, B, T)
    return inputs


def make_starts(kind: str, B: int, T: int) -> Tensor:
    starts = torch.zeros(B, T, dtype=torch.bool)
    if kind == "first":
        starts[:, 0] = True
    elif kind == "consecutive":
        # The last row differs from the others, so that a reset of the wrong row shows.
        starts[:-1, T // 2 : T // 2 + 3] = True
        starts[-1, -1] = True
    elif kind == "random":
        starts = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.2
    else:
        starts[:] = True
    return starts


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of any tensor, over its largest magnitude.

    The two gradients of Lambda are one complex number's: either is measured against both.
    """
    sizes = magnitudes(expected)
    both = max(sizes["dLambda_re"], sizes["dLambda_im"])
    return worst(actual, expected, {"dLambda_re": both, "dLambda_im": both})


def unrolled(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """y and the last state from sums over the steps of t's own document, number by number."""
    v, h0, starts = inputs["v"], inputs.get("h0"), inputs.get("starts")
    (B, T, H), N = v.shape, inputs["Lambda_re"].numel()
    y, h_last = torch.zeros_like(v), torch.zeros(B, H, N, 2, dtype=v.dtype)
    for n in range(N):
        Lambda = complex(-math.exp(inputs["Lambda_re"][n]), math.exp(inputs["Lambda_im"][n]))
        for b, t, h in torch.cartesian_prod(*map(torch.arange, (B, T, H))).tolist():
            begins = 0
            for s in range(t + 1):
                begins = s if starts is not None and starts[b, s] else begins
            terms = (cmath.exp(Lambda * (t - s)) * float(v[b, s, h]) for s in range(begins, t + 1))
            state = sum(terms, 0j)
            fresh = starts is not None and bool(starts[b, : t + 1].any())
            if h0 is not None and not fresh:
                state += cmath.exp(Lambda * (t + 1)) * complex(*h0[b, h, n].tolist())
            C = complex(inputs["C_re"][h, n], inputs["C_im"][h, n])
            y[b, t, h] += (C * (cmath.exp(Lambda) - 1) / Lambda * state).real
            h_last[b, h, n] = torch.tensor([state.real, state.imag], dtype=v.dtype)
    return y + inputs["D"] * v, h_last


@each_backend
@pytest.mark.parametrize("starts_kind", ["none", "first", "consecutive", "random"])
@pytest.mark.parametrize("with_h0", [False, True])
def test_equals_unrolled_sums(backend: str, starts_kind: str, with_h0: bool) -> None:
    inputs = problem(2, 9, 3, 4, starts_kind, with_h0)
    y, h_last = backend_function(backend)(**inputs)
    expected, expected_last = unrolled(inputs)
    # Sums of some forty terms of order one in float64.
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-14)
    torch.testing.assert_close(h_last, expected_last, rtol=0, atol=2e-14)


CASES = [
    (shape, starts, with_h0)
    for shape in SHAPES
    for starts in KINDS
    for with_h0 in (False, True)
    if shape[1] < 100 or starts in ("none", "random")
]


@functools.cache
def oracle(*case: Any) -> dict[str, Tensor]:
    """What the oracle says in float64 about the numbers of the problem."""
    return outcome(backend_function("naive"), converted(problem(*case), torch.float64))


@each_backend
@pytest.mark.parametrize(("shape", "starts", "with_h0"), CASES)
def test_matches_oracle(backend: str, shape: tuple[int, ...], starts: str, with_h0: bool) -> None:
    case: tuple[Any, ...] = (*shape, starts, with_h0, torch.float32)
    for dtype in (torch.float32, torch.float64):
        actual = outcome(backend_function(backend), converted(problem(*case), dtype))
        # The recurrence rounds exp(Lambda) once, by half a unit, and multiplies by it T times.
        # The gradients of Lambda are sums of all states with both signs: some more units.
        limit = torch.finfo(dtype).eps * (16 + shape[1] / 2)
        assert error(actual, oracle(*case)) <= limit, dtype


@each_backend
@pytest.mark.parametrize("starts", ["none", "random"])
def test_bfloat16_input_is_computed_in_float32(backend: str, starts: str) -> None:
    case = (2, 63, 5, 17, starts, True, torch.bfloat16)
    y, h_last = backend_function(backend)(**problem(*case))
    assert (y.dtype, h_last.dtype) == (torch.bfloat16, torch.float32)
    actual, expected = outcome(backend_function(backend), problem(*case)), oracle(*case)
    # Rounded to bfloat16 once, on the way out: y, and the gradient that goes back to v.
    rounded = {name: (actual.pop(name), expected[name]) for name in ("y", "dv")}
    assert all(is_rounded_once(*pair, 2e-5) for pair in rounded.values())
    assert error(actual, {name: expected[name] for name in actual}) <= EPS32 * 40


@pytest.mark.parametrize("starts", ["none", "consecutive"])
def test_gradcheck(starts: str) -> None:
    # Central differences with step 1e-6 in float64 are good to about 1e-9 of values of order ten.
    gradcheck(backend_function("fft"), problem(2, 7, 2, 3, starts))


@pytest.mark.parametrize("starts", ["none", "consecutive"])
@pytest.mark.parametrize("wanted", list(problem(1, 1, 1, 1)))
def test_each_gradient_alone(wanted: str, starts: str) -> None:
    inputs = problem(2, 7, 2, 3, starts)
    everything = outcome(backend_function("fft"), inputs)[f"d{wanted}"]
    alone = outcome(backend_function("fft"), inputs, wanted)[f"d{wanted}"]
    torch.testing.assert_close(alone, everything, rtol=0, atol=1e-14)


@each_backend
@pytest.mark.parametrize("lengths", [[1, 62], [20, 20, 23], [1] * 63])
def test_pieces_with_carried_state_equal_the_whole(backend: str, lengths: list[int]) -> None:
    function, inputs = backend_function(backend), problem(2, 63, 5, 17, "random")
    carried = outcome(in_pieces(function, lengths, ("v", "starts")), inputs)
    assert error(carried, outcome(function, inputs)) <= 1e-13


@each_backend
@pytest.mark.parametrize("lengths", [[5, 1, 1, 30, 26], [63], [1, 62], [31, 32]])
def test_packed_documents_equal_separate_ones(backend: str, lengths: list[int]) -> None:
    function, inputs = backend_function(backend), problem(1, 63, 5, 17, with_h0=False)
    packed = outcome(function, inputs | {"starts": starts_of(lengths)})
    assert error(packed, outcome(in_pieces(function, lengths, ("v",)), inputs)) <= 1e-13


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_non_contiguous_inputs(backend: str, dtype: torch.dtype) -> None:
    inputs = problem(3, 21, 4, 6, "random", True, dtype)
    strided = {
        name: x.transpose(0, -1).contiguous().transpose(0, -1)
        if name in ("v", "h0", "starts")
        else x.repeat_interleave(2, -1)[..., ::2]
        for name, x in inputs.items()
    }
    assert not any(x.is_contiguous() for x in strided.values())
    actual, expected = (outcome(backend_function(backend), x) for x in (strided, inputs))
    # Other strides may take another order of the same sums.
    limit = 2**-7 if dtype == torch.bfloat16 else 20 * torch.finfo(dtype).eps
    assert error(actual, expected) <= limit


@each_backend
@pytest.mark.parametrize("T", [1, 9])
def test_the_last_state_can_be_left_out(backend: str, T: int) -> None:
    inputs = problem(2, T, 3, 5)
    y, h_last = backend_function(backend)(**inputs, last_state=False)
    assert h_last is None
    assert torch.equal(y, backend_function(backend)(**inputs)[0])


def test_long_lags_are_exact_in_float32() -> None:
    T = 8192
    inputs = problem(1, T, 1, 7, "none", False, torch.float32)
    # An impulse: y is the kernel.
    inputs["v"] = torch.zeros(1, T, 1)
    inputs["v"][0, 0] = 1.0
    y, _ = backend_function("fft")(**inputs)
    exact = converted(inputs, torch.float64)
    Lambda = torch.complex(-exact["Lambda_re"].exp(), exact["Lambda_im"].exp())
    C = torch.complex(exact["C_re"], exact["C_im"]) * (Lambda.exp() - 1) / Lambda
    kernel = (C * (Lambda * torch.arange(T).unsqueeze(-1)).exp()).sum(-1).real
    kernel[0] += exact["D"][0]
    # A few roundings of the largest value, at a lag of one and of thousands alike.
    error = (y[0, :, 0].double() - kernel).abs()
    assert float(error.max() / kernel.abs().max()) <= 8 * EPS32
    # The control: angles rounded to float32 are off by far more.
    angles = exact["Lambda_im"].float() * torch.arange(T).unsqueeze(-1)
    wrong = angles.double() - exact["Lambda_im"] * torch.arange(T).unsqueeze(-1)
    assert float(wrong.abs().max()) > 1e-4


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 16, 17, 63, 500])
def test_powers_by_definition(T: int) -> None:
    Lambda = torch.complex(-torch.rand(5).double(), 3 * torch.rand(5).double())
    expected = torch.stack([(Lambda * lag).exp() for lag in range(T)])
    actual = _powers(Lambda, T, Lambda)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@each_backend
def test_autocast_does_not_reach_it(backend: str) -> None:
    inputs = problem(2, 7, 3, 5, "none", True, torch.float32)
    with OPS["dss"].force(backend), torch.autocast("cpu", torch.bfloat16):
        outputs = dss(**inputs)
    for actual, expected in zip(outputs, backend_function(backend)(**inputs), strict=True):
        assert actual is not None
        assert torch.equal(actual, expected)
