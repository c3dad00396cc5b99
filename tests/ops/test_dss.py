"""The diagonal state space of Mehta et al.: every backend against the oracle and closed forms."""

from __future__ import annotations

import cmath
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, dss
from pha.ops.dss import _fft_length, _powers

BACKENDS = sorted(OPS["dss"].backends)
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 5), (1, 2, 3, 16), (2, 63, 5, 17), (4, 7, 3, 9), (3, 500, 5, 7)]
NAMES = ("v", "Lambda_re", "Lambda_im", "C_re", "C_im", "D")
DSSFunction = Callable[..., tuple[Tensor, Tensor | None]]
EPS32 = torch.finfo(torch.float32).eps

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def backend_function(name: str) -> DSSFunction:
    return OPS["dss"].backends[name]


def problem(
    B: int, T: int, H: int, N: int, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs by name, and h0. Modes forget within one to a thousand steps, at any frequency."""
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
    }
    return inputs, normal(B, H, N, 2)


def make_starts(kind: str, B: int, T: int) -> Tensor | None:
    if kind == "none":
        return None
    starts = torch.zeros(B, T, dtype=torch.bool)
    if kind == "first":
        starts[:, 0] = True
    elif kind == "consecutive":
        # The last row differs from the others, so that a reset of the wrong row shows.
        starts[:-1, T // 2 : T // 2 + 3] = True
        starts[-1, -1] = True
    elif kind == "random":
        starts = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.2
    elif kind == "all":
        starts[:] = True
    return starts


def values_and_gradients(
    function: DSSFunction, inputs: dict[str, Tensor], h0: Tensor | None, starts: Tensor | None
) -> dict[str, Tensor]:
    """y, h_last and the gradients of a fixed weighting of both, all as float64."""
    leaves = inputs | ({} if h0 is None else {"h0": h0})
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    y, h_last = function(*(leaves[name] for name in NAMES), leaves.get("h0"), starts)
    assert h_last is not None
    generator = torch.Generator().manual_seed(7)
    # Rounded to bfloat16, so that every precision is given the same upstream gradient exactly.
    w, w_last = (torch.randn(x.shape, generator=generator).bfloat16() for x in (y, h_last))
    total = (y.double() * w.double()).sum() + (h_last.double() * w_last.double()).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    results = {"y": y, "h_last": h_last}
    results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: x.detach().double() for name, x in results.items()}


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, over its largest magnitude.

    The two gradients of Lambda are one complex number's: either is measured against both.
    """
    assert actual.keys() == expected.keys()
    sizes = {name: y.abs().max() for name, y in expected.items()}
    sizes["dLambda_re"] = sizes["dLambda_im"] = max(sizes["dLambda_re"], sizes["dLambda_im"])
    return {
        name: float((actual[name] - y).abs().max() / sizes[name].clamp_min(1e-30))
        for name, y in expected.items()
    }


def unrolled(
    inputs: dict[str, Tensor], h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the last state from sums over the steps of t's own document, number by number."""
    v = inputs["v"]
    (B, T, H), N = v.shape, inputs["Lambda_re"].numel()
    y, h_last = torch.zeros_like(v), torch.zeros(B, H, N, 2, dtype=v.dtype)
    for n in range(N):
        Lambda = complex(-math.exp(inputs["Lambda_re"][n]), math.exp(inputs["Lambda_im"][n]))
        for b, t, h in torch.cartesian_prod(*map(torch.arange, (B, T, H))).tolist():
            begins = 0
            for s in range(t + 1):
                begins = s if starts is not None and starts[b, s] else begins
            state = sum(
                cmath.exp(Lambda * (t - s)) * float(v[b, s, h]) for s in range(begins, t + 1)
            )
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
    inputs, h0 = problem(2, 9, 3, 4)
    starts = make_starts(starts_kind, 2, 9)
    state = h0 if with_h0 else None
    y, h_last = backend_function(backend)(*inputs.values(), state, starts)
    expected, expected_last = unrolled(inputs, state, starts)
    # Sums of some forty terms of order one in float64.
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-14)
    torch.testing.assert_close(h_last, expected_last, rtol=0, atol=2e-14)


CASES = [
    (shape, kind, with_h0)
    for shape in SHAPES
    for kind in ("none", "first", "consecutive", "random", "all")
    for with_h0 in (False, True)
    if shape[1] < 100 or kind in ("none", "random")
]


@functools.cache
def oracle(shape: tuple[int, ...], starts_kind: str, with_h0: bool) -> dict[str, Tensor]:
    """What the oracle says in float64 about the numbers of the float32 problem."""
    inputs, h0 = problem(*shape, torch.float32)
    inputs = {name: x.double() for name, x in inputs.items()}
    starts = make_starts(starts_kind, *shape[:2])
    return values_and_gradients(
        backend_function("naive"), inputs, h0.double() if with_h0 else None, starts
    )


@each_backend
@pytest.mark.parametrize(("shape", "starts_kind", "with_h0"), CASES)
def test_matches_oracle(
    backend: str, shape: tuple[int, ...], starts_kind: str, with_h0: bool
) -> None:
    starts = make_starts(starts_kind, *shape[:2])
    expected = oracle(shape, starts_kind, with_h0)
    for dtype in (torch.float32, torch.float64):
        inputs, h0 = problem(*shape, torch.float32)
        inputs = {name: x.to(dtype) for name, x in inputs.items()}
        actual = values_and_gradients(
            backend_function(backend), inputs, h0.to(dtype) if with_h0 else None, starts
        )
        # The recurrence rounds exp(Lambda) once, by half a unit, and multiplies by it T times.
        # The gradients of Lambda are sums of all states with both signs: some more units.
        limit = torch.finfo(dtype).eps * (16 + shape[1] / 2)
        errors = relative_errors(actual, expected)
        assert max(errors.values()) <= limit, (dtype, errors)


@each_backend
@pytest.mark.parametrize("starts_kind", ["none", "random"])
def test_bfloat16_input_is_computed_in_float32(backend: str, starts_kind: str) -> None:
    shape = (2, 63, 5, 17)
    inputs, h0 = problem(*shape, torch.bfloat16)
    starts = make_starts(starts_kind, *shape[:2])
    y, h_last = backend_function(backend)(*inputs.values(), h0, starts)
    assert y.dtype == torch.bfloat16
    assert h_last is not None
    assert h_last.dtype == torch.float32
    actual = values_and_gradients(backend_function(backend), inputs, h0, starts)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = values_and_gradients(backend_function("naive"), exact, h0.double(), starts)
    errors = relative_errors(actual, expected)
    # Rounded to bfloat16 once, on the way out: y, and the gradient that goes back to v.
    for name in ("y", "dv"):
        slack = 2e-5 * expected[name].abs().max()
        wrong = (actual[name] - expected[name]).abs() - 2**-8 * expected[name].abs()
        assert float(wrong.max()) <= slack, name
        del errors[name]
    assert max(errors.values()) <= EPS32 * 40, errors


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "naive"])
@pytest.mark.parametrize("wanted", [*((i,) for i in range(7)), tuple(range(7))])
@pytest.mark.parametrize("starts_kind", ["none", "consecutive"])
def test_gradcheck(backend: str, wanted: tuple[int, ...], starts_kind: str) -> None:
    inputs, h0 = problem(2, 7, 2, 3)
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate([*inputs.values(), h0])]
    starts = make_starts(starts_kind, 2, 7)
    # Central differences with step 1e-6 in float64 are good to about 1e-9 of values of order ten.
    assert torch.autograd.gradcheck(
        lambda *x: backend_function(backend)(*x, starts), leaves, eps=1e-6, atol=1e-7, rtol=1e-7
    )


@each_backend
@pytest.mark.parametrize("pieces", [[1, 62], [20, 20, 23], [1] * 63])
def test_pieces_with_carried_state_equal_the_whole(backend: str, pieces: list[int]) -> None:
    inputs, h0 = problem(2, 63, 5, 17)
    starts = make_starts("random", 2, 63)

    def in_pieces(v: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        *parameters, state, starts = rest
        outputs = []
        for piece, mask in zip(v.split(pieces, 1), starts.split(pieces, 1), strict=True):
            y, state = backend_function(backend)(piece, *parameters, state, mask)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    whole = values_and_gradients(backend_function(backend), inputs, h0, starts)
    carried = values_and_gradients(in_pieces, inputs, h0, starts)
    assert max(relative_errors(carried, whole).values()) <= 1e-13


@each_backend
@pytest.mark.parametrize("lengths", [[5, 1, 1, 30, 26], [63], [1, 62], [31, 32]])
def test_packed_documents_equal_separate_ones(backend: str, lengths: list[int]) -> None:
    inputs, _ = problem(1, 63, 5, 17)
    starts = torch.zeros(1, 63, dtype=torch.bool)
    starts[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True

    def separate(v: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        results = [backend_function(backend)(x, *rest[:5]) for x in v.split(lengths, 1)]
        return torch.cat([y for y, _ in results], 1), results[-1][1]

    packed = values_and_gradients(backend_function(backend), inputs, None, starts)
    apart = values_and_gradients(separate, inputs, None, None)
    assert max(relative_errors(packed, apart).values()) <= 1e-13


@each_backend
def test_a_start_at_zero_forgets_the_given_state(backend: str) -> None:
    inputs, h0 = problem(2, 7, 3, 5)
    h0.requires_grad_()
    starts = make_starts("first", 2, 7)
    y, h_last = backend_function(backend)(*inputs.values(), h0, starts)
    without, without_last = backend_function(backend)(*inputs.values())
    assert torch.equal(y, without)
    assert h_last is not None
    assert torch.equal(h_last, without_last)
    (gradient,) = torch.autograd.grad(y.sum() + h_last.sum(), h0)
    assert torch.equal(gradient, torch.zeros_like(h0))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_non_contiguous_inputs(backend: str, dtype: torch.dtype) -> None:
    inputs, h0 = problem(3, 21, 4, 6, dtype)
    starts = make_starts("random", 3, 21)
    assert starts is not None

    def strided(*x: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, state, starts = x
        moved = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (*tensors[:1], state)]
        vectors = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors[1:]]
        assert not any(t.is_contiguous() for t in (*moved, *vectors))
        v, state = moved
        return backend_function(backend)(v, *vectors, state, starts.T.contiguous().T)

    actual = values_and_gradients(strided, inputs, h0, starts)
    expected = values_and_gradients(backend_function(backend), inputs, h0, starts)
    # Other strides may take another order of the same sums.
    limit = 2**-7 if dtype == torch.bfloat16 else 20 * torch.finfo(dtype).eps
    assert max(relative_errors(actual, expected).values()) <= limit


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_stay_as_they_are_and_the_last_state_is_its_own(
    backend: str, dtype: torch.dtype
) -> None:
    inputs, h0 = problem(2, 7, 3, 5, dtype)
    starts = make_starts("consecutive", 2, 7)
    assert starts is not None
    tensors = [*inputs.values(), h0, starts]
    before = [x.clone() for x in tensors]
    y, h_last = backend_function(backend)(*tensors)
    assert all(torch.equal(x, kept) for x, kept in zip(tensors, before, strict=True))
    kept = y.clone()
    assert h_last is not None
    h_last.fill_(99.0)
    assert torch.equal(y, kept)
    assert all(torch.equal(x, kept) for x, kept in zip(tensors, before, strict=True))


@each_backend
@pytest.mark.parametrize("T", [1, 9])
def test_the_last_state_can_be_left_out(backend: str, T: int) -> None:
    inputs, h0 = problem(2, T, 3, 5)
    y, h_last = backend_function(backend)(*inputs.values(), h0, None, False)
    assert h_last is None
    assert torch.equal(y, backend_function(backend)(*inputs.values(), h0)[0])


def test_long_lags_are_exact_in_float32() -> None:
    T = 8192
    inputs, _ = problem(1, T, 1, 7, torch.float32)
    # An impulse: y is the kernel.
    inputs["v"] = torch.zeros(1, T, 1)
    inputs["v"][0, 0] = 1.0
    y, _ = backend_function("fft")(*inputs.values())
    exact = {name: x.double() for name, x in inputs.items()}
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
    actual = _powers(Lambda, T, torch.complex128)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_fft_lengths_hold_the_convolution_and_waste_little() -> None:
    for T in range(1, 3000):
        n = _fft_length(T)
        assert n >= 2 * T - 1
        odd = n
        while odd % 2 == 0:
            odd //= 2
        assert odd in (1, 3, 5)
        # From one such length to the next is at most a third.
        assert n <= max(2, (2 * T - 1) * 4 / 3)


@each_backend
def test_the_public_function_runs_the_forced_backend_outside_autocast(backend: str) -> None:
    inputs, h0 = problem(2, 7, 3, 5, torch.float32)
    expected, expected_last = backend_function(backend)(*inputs.values(), h0)
    with OPS["dss"].force(backend), torch.autocast("cpu", torch.bfloat16):
        y, h_last = dss(*inputs.values(), h0)
    assert torch.equal(y, expected)
    assert h_last is not None
    assert torch.equal(h_last, expected_last)
