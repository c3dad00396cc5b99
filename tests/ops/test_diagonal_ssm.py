"""The diagonal state space of S4D: backends against sums written out, documents, splits."""

from __future__ import annotations

import cmath
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, diagonal_ssm, linear_scan
from pha.utils.errors import PHAError
from tests.ops.common import (
    Inputs,
    converted,
    cpu_backends,
    gradcheck,
    in_pieces,
    is_rounded_once,
    outcome,
    starts_of,
    worst,
)

each_backend = pytest.mark.parametrize("backend", cpu_backends("diagonal_ssm"))
EPS32 = torch.finfo(torch.float32).eps


def problem(B: int, T: int, C: int, N: int, *, starts: bool = True, with_h0: bool = True) -> Inputs:
    """Modes forget within one to a thousand steps, at any frequency."""
    generator = torch.Generator().manual_seed(10 * T + N)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs: Inputs = {"u": normal(B, T, C), "D": normal(C), "w_re": normal(C, N)}
    inputs |= {
        "w_im": normal(C, N),
        "Lambda_im": 3 * torch.rand(C, N, generator=generator).double(),
    }
    inputs["Lambda_re"] = -torch.logspace(-3, 0, C * N).double().view(C, N)
    if with_h0:
        inputs["h0"] = normal(B, C, N, 2)
    if starts:
        inputs["starts"] = torch.rand(B, T, generator=generator) < 0.2
    return inputs


def run(backend: str, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    with OPS["diagonal_ssm"].force(backend):
        return diagonal_ssm(**inputs)


def unrolled(**inputs: Any) -> tuple[Tensor, Tensor]:
    """y and the last state from the recurrence of every number by itself."""
    u, h0, starts = inputs["u"], inputs.get("h0"), inputs.get("starts")
    (B, T, C), N = u.shape, inputs["w_re"].shape[1]
    y, last = (inputs["D"] * u).clone(), torch.zeros(B, C, N, 2, dtype=u.dtype)
    for b, c, n in torch.cartesian_prod(*map(torch.arange, (B, C, N))).tolist():
        a = cmath.exp(complex(inputs["Lambda_re"][c, n], inputs["Lambda_im"][c, n]))
        w = complex(inputs["w_re"][c, n], inputs["w_im"][c, n])
        h = 0j if h0 is None else complex(*h0[b, c, n].tolist())
        for t in range(T):
            h = 0j if starts is not None and starts[b, t] else h
            h = a * h + float(u[b, t, c])
            y[b, t, c] += 2 * (w * h).real
        last[b, c, n] = torch.tensor([h.real, h.imag], dtype=u.dtype)
    return y, last


@each_backend
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 3, 4), (2, 9, 3, 2), (1, 63, 2, 3)])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("with_h0", [False, True])
def test_equals_the_recurrence_written_out(
    backend: str, shape: Any, starts: bool, with_h0: bool
) -> None:
    inputs = problem(*shape, starts=starts, with_h0=with_h0)
    for actual, expected in zip(run(backend, **inputs), unrolled(**inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 7, 2, 3), (2, 1, 2, 3)])
@pytest.mark.parametrize("starts", [False, True])
def test_gradients(shape: Any, starts: bool) -> None:
    gradcheck(functools.partial(run, "fft"), problem(*shape, starts=starts))


@pytest.mark.parametrize("T", [2, 63, 500])
def test_all_gradients_equal_the_oracles(T: int) -> None:
    inputs = problem(2, T, 3, 5)
    actual, expected = (
        outcome(functools.partial(run, backend), inputs) for backend in ("fft", "naive")
    )
    assert worst(actual, expected) <= 1e-11


@each_backend
@pytest.mark.parametrize("lengths", [[1, 62], [20, 20, 23], [1] * 63])
def test_pieces_with_carried_state_equal_the_whole(backend: str, lengths: list[int]) -> None:
    function = functools.partial(run, backend)
    inputs = problem(2, 63, 3, 5)
    carried = in_pieces(function, lengths, ("u", "starts"))
    assert worst(outcome(carried, inputs), outcome(function, inputs)) <= 1e-12
    inputs = problem(1, 63, 3, 5, starts=False, with_h0=False)
    packed = outcome(function, inputs | {"starts": starts_of(lengths)})
    assert worst(packed, outcome(in_pieces(function, lengths, ("u",)), inputs)) <= 1e-12


def test_with_real_modes_it_is_a_scan() -> None:
    inputs = problem(2, 63, 3, 1)
    inputs["Lambda_im"], inputs["h0"][..., 1] = torch.zeros(3, 1).double(), 0
    y, last = run("fft", **inputs)
    u, decay = inputs["u"], inputs["Lambda_re"].exp().view(1, 1, 3).expand(2, 63, 3)
    h, h_last = linear_scan(u, decay, inputs["h0"][:, :, 0, 0], inputs["starts"])
    expected = 2 * inputs["w_re"].T * h + inputs["D"] * u
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert last is not None
    torch.testing.assert_close(last[:, :, 0, 0], h_last, rtol=0, atol=1e-12)


def test_long_lags_are_exact_in_float32() -> None:
    T = 8192
    inputs = problem(1, T, 2, 3, starts=False, with_h0=False)
    inputs["u"] = torch.zeros(1, T, 2)
    inputs["u"][0, 0] = 1.0  # an impulse: y is the kernel
    narrow = inputs | {n: inputs[n].float() for n in ("w_re", "w_im", "D")}
    y, _ = run("fft", **narrow)
    Lambda, w = (torch.complex(inputs[f"{n}_re"], inputs[f"{n}_im"]) for n in ("Lambda", "w"))
    kernel = 2 * (w * (Lambda * torch.arange(T).view(T, 1, 1)).exp()).sum(-1).real
    kernel[0] += inputs["D"]
    assert float((y[0].double() - kernel).abs().max() / kernel.abs().max()) <= 10 * EPS32


@each_backend
@pytest.mark.parametrize("T", [1, 40])
def test_half_precision_is_computed_in_float32(backend: str, T: int) -> None:
    inputs = problem(2, T, 3, 4)
    rounded = converted(inputs, torch.float32) | {"u": inputs["u"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        y, last = run(backend, **rounded)
    assert last is not None
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    exact = run("naive", **converted(rounded, torch.float64))[0]
    assert is_rounded_once(y.double(), exact, 1e-5)


@pytest.mark.parametrize("name", ["Lambda_re", "w_im", "D", "h0", "starts", "mask"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    inputs = problem(2, 7, 5, 4) | {"mask": torch.ones(2, 7, dtype=torch.bool)}
    inputs[name] = inputs[name][:1]
    with pytest.raises(PHAError, match=f"diagonal_ssm: {name} is "):
        diagonal_ssm(**inputs)
