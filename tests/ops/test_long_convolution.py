"""The long convolution: backends against sums written out, its last inputs, documents, splits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, long_convolution
from pha.ops.long_convolution import _fft_length
from pha.utils.errors import PHAError
from tests.ops.common import (
    Inputs,
    cpu_backends,
    gradcheck,
    in_pieces,
    is_rounded_once,
    outcome,
    starts_of,
    worst,
)

each_backend = pytest.mark.parametrize("backend", cpu_backends("long_convolution"))


def problem(B: int, T: int, C: int, L: int, *, starts: bool = True, past: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(T + L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs: Inputs = {"x": normal(B, T, C), "kernel": normal(L, C)}
    if past:
        inputs["past"] = normal(B, L - 1, C)
    if starts:
        inputs["starts"] = torch.rand(B, T, generator=generator) < 0.2
    return inputs


def run(backend: str, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    with OPS["long_convolution"].force(backend):
        return long_convolution(**inputs)


def written_out(
    x: Tensor, kernel: Tensor, past: Any = None, starts: Any = None
) -> tuple[Tensor, Tensor]:
    """Sums over the inputs of t's own document, one number after the other."""
    (B, T, C), L = x.shape, len(kernel)
    y, last = torch.zeros_like(x), x.new_zeros(B, L - 1, C)
    for b in range(B):
        history = [] if past is None else list(past[b])
        for t in range(T):
            history = [] if starts is not None and starts[b, t] else history
            history.append(x[b, t])
            y[b, t] = sum(k * v for k, v in zip(kernel, reversed(history), strict=False))
        for i, v in zip(range(L - 1), reversed(history), strict=False):
            last[b, L - 2 - i] = v
    return y, last


@each_backend
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 1, 3, 9), (2, 7, 3, 4), (3, 5, 2, 9), (2, 63, 3, 63)]
)
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("past", [False, True])
def test_equals_the_sums_written_out(backend: str, shape: Any, starts: bool, past: bool) -> None:
    inputs = problem(*shape, starts=starts, past=past)
    for actual, expected in zip(run(backend, **inputs), written_out(**inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@each_backend
@pytest.mark.parametrize("shape", [(2, 7, 3, 4), (2, 5, 2, 9), (2, 1, 3, 4)])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("past", [False, True])
def test_gradients(backend: str, shape: Any, starts: bool, past: bool) -> None:
    gradcheck(functools.partial(run, backend), problem(*shape, starts=starts, past=past))


@each_backend
@pytest.mark.parametrize("lengths", [[1] * 13, [2, 1, 10], [12, 1], [6, 7]])
@pytest.mark.parametrize("L", [5, 20])
def test_pieces_with_past_inputs_equal_the_whole(backend: str, lengths: list[int], L: int) -> None:
    function = functools.partial(run, backend)
    inputs = problem(2, 13, 3, L)
    carried = in_pieces(function, lengths, ("x", "starts"), "past")
    assert worst(outcome(carried, inputs), outcome(function, inputs)) <= 1e-13
    # Each piece alone is a document alone.
    inputs = problem(1, 13, 3, L, starts=False, past=False)
    apart = in_pieces(function, lengths, ("x",), "past")
    packed = outcome(function, inputs | {"starts": starts_of(lengths)})
    assert worst(packed, outcome(apart, inputs)) <= 1e-13


@pytest.mark.parametrize("past", [False, True])
def test_a_prefix_gives_the_same_outputs(past: bool) -> None:
    inputs = problem(2, 63, 3, 40, starts=False, past=past)
    whole, _ = run("fft", **inputs)
    for t in (1, 2, 31, 62):
        prefix, _ = run("fft", **inputs | {"x": inputs["x"][:, :t]})
        torch.testing.assert_close(prefix, whole[:, :t], rtol=0, atol=1e-13)


@each_backend
@pytest.mark.parametrize("T", [1, 40])
def test_half_precision_is_rounded_once(backend: str, T: int) -> None:
    inputs = problem(2, T, 3, 64)
    rounded = inputs | {name: inputs[name].bfloat16() for name in ("x", "past")}
    rounded["kernel"] = inputs["kernel"].float()
    with torch.autocast("cpu", torch.bfloat16):
        y, last = run(backend, **rounded)
    assert last is not None
    assert y.dtype == last.dtype == torch.bfloat16
    wide = {k: v.double() if v.is_floating_point() else v for k, v in rounded.items()}
    assert is_rounded_once(y.double(), run("naive", **wide)[0], 1e-6)


@pytest.mark.parametrize("name", ["kernel", "past", "starts", "mask"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    inputs = problem(2, 7, 5, 4) | {"mask": torch.ones(2, 7, dtype=torch.bool)}
    inputs[name] = inputs[name][:1, :2]
    with pytest.raises(PHAError, match=f"long_convolution: {name} is "):
        long_convolution(**inputs)


def test_as_an_operator_of_torch() -> None:
    inputs = problem(2, 7, 3, 4, past=False)
    x, kernel = (inputs[n].float().requires_grad_() for n in ("x", "kernel"))
    op = torch.ops.pha.convolve.default
    torch.library.opcheck(op, (x, kernel, inputs["starts"]))


def test_fft_lengths_hold_the_convolution_and_waste_little() -> None:
    for T in range(1, 3000):
        for L in {1, T // 3 + 1, T}:
            n = _fft_length(T, L)
            assert n >= T + L - 1
            odd = n
            while odd % 2 == 0:
                odd //= 2
            assert odd in (1, 3, 5)
            # From one such length to the next is at most a third.
            assert n <= max(2, (T + L - 1) * 4 / 3)
