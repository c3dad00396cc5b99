"""The short convolution: backends against sums written out, its last inputs, documents, splits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, short_convolution
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

each_backend = pytest.mark.parametrize("backend", cpu_backends("short_convolution"))
OVER_TIME = ("x", "starts")


def problem(B: int, T: int, C: int, w: int, starts: bool = True, past: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(T + w)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs: Inputs = {"x": normal(B, T, C), "weight": normal(C, w), "bias": normal(C)}
    if past:
        inputs["past"] = normal(B, w - 1, C)
    if starts:
        inputs["starts"] = torch.rand(B, T, generator=generator) < 0.2
    return inputs


def run(backend: str, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    with OPS["short_convolution"].force(backend):
        return short_convolution(**inputs)


def written_out(
    x: Tensor, weight: Tensor, bias: Tensor, past: Any = None, starts: Any = None
) -> tuple[Tensor, Tensor]:
    """Sums over the inputs of t's own document, one number after the other."""
    (B, T, C), w = x.shape, weight.shape[1]
    y, last = torch.zeros_like(x), x.new_zeros(B, w - 1, C)
    for b in range(B):
        history = [] if past is None else list(past[b])
        for t in range(T):
            history = [] if starts is not None and starts[b, t] else history
            history.append(x[b, t])
            recent = history[-w:]
            y[b, t] = bias + sum(weight[:, -1 - i] * v for i, v in enumerate(reversed(recent)))
        for i, v in enumerate(reversed(history[1 - w :])):
            last[b, w - 2 - i] = v
    return y, last


@each_backend
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 4), (3, 5, 2, 9), (2, 70, 3, 64)])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("past", [False, True])
def test_equals_the_sums_written_out(backend: str, shape: Any, starts: bool, past: bool) -> None:
    B, T, C, w = shape
    inputs = problem(B, T, C, w, starts, past)
    for actual, expected in zip(run(backend, **inputs), written_out(**inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@each_backend
@pytest.mark.parametrize("starts", [False, True])
def test_gradients(backend: str, starts: bool) -> None:
    gradcheck(lambda **x: run(backend, **x), problem(2, 7, 3, 4, starts))


@each_backend
@pytest.mark.parametrize("lengths", [[1] * 13, [2, 1, 10], [12, 1], [6, 7]])
def test_pieces_shorter_than_the_taps_too_equal_the_whole(backend: str, lengths: list[int]) -> None:
    def function(**x: Any) -> Any:
        return run(backend, **x)

    inputs = problem(2, 13, 3, 5)
    carried = in_pieces(function, lengths, OVER_TIME, "past")
    assert worst(outcome(carried, inputs), outcome(function, inputs)) <= 1e-14
    # Each piece alone is a document alone.
    inputs = problem(1, 13, 3, 5, starts=False, past=False)
    apart = in_pieces(function, lengths, ("x",), "past")
    packed = outcome(function, inputs | {"starts": starts_of(lengths)})
    assert worst(packed, outcome(apart, inputs)) <= 1e-14


@each_backend
def test_another_document_is_not_looked_at(backend: str) -> None:
    inputs = problem(1, 9, 3, 4, starts=False) | {"starts": starts_of([0, 5, 4])}
    inputs["past"][:], inputs["x"][:, :5] = torch.nan, torch.inf
    y, last = run(backend, **inputs)
    assert not y[:, :5].isfinite().any()
    assert y[:, 5:].isfinite().all()
    assert last is not None
    assert last.isfinite().all()


@each_backend
def test_half_precision_is_rounded_once(backend: str) -> None:
    inputs = problem(2, 40, 3, 64)
    rounded = inputs | {"x": inputs["x"].bfloat16(), "past": inputs["past"].bfloat16()}
    rounded |= {name: inputs[name].float() for name in ("weight", "bias")}
    with torch.autocast("cpu", torch.bfloat16):
        y, last = run(backend, **rounded)
    assert last is not None
    assert y.dtype == last.dtype == torch.bfloat16
    wide = {k: v.double() if v.is_floating_point() else v for k, v in rounded.items()}
    assert is_rounded_once(y.double(), run("naive", **wide)[0], 1e-6)


@pytest.mark.parametrize("name", ["weight", "bias", "past", "starts", "mask"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    inputs = problem(2, 7, 5, 4) | {"mask": torch.ones(2, 7, dtype=torch.bool)}
    inputs[name] = inputs[name][:1]
    with pytest.raises(PHAError, match=f"{name} is "):
        short_convolution(**inputs)


@pytest.mark.parametrize("w", [1, 65])
def test_as_many_taps_as_there_may_be(w: int) -> None:
    with pytest.raises(PHAError, match=f"{w} taps; give 2 to 64"):
        short_convolution(torch.ones(1, 3, 2), torch.ones(2, w))


def test_as_an_operator_of_torch() -> None:
    inputs = problem(2, 7, 3, 4, past=False)
    x, weight, bias = (inputs[n].float().requires_grad_() for n in ("x", "weight", "bias"))
    op = torch.ops.pha.short_convolve.default
    torch.library.opcheck(op, (x, weight, bias, inputs["starts"][:, 3:]))


@pytest.mark.parametrize("documents", [False, True])
def test_outputs_lie_in_memory_as_graphs_are_told(documents: bool) -> None:
    x = torch.randn(2, 9, 3)
    starts = torch.zeros(2, 7, dtype=torch.bool) if documents else None
    y = torch.ops.pha.short_convolve(x, torch.randn(3, 3), None, starts)
    dx, _ = torch.ops.pha.short_convolve_backward(
        torch.randn(2, 7, 3), x, torch.randn(3, 3), starts
    )
    assert y.is_contiguous()
    assert dx.is_contiguous()
