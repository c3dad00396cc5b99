"""Norms, rotation and gates: the closed forms against the equations, and what they keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops import OPS

NAMES = ("rms_norm", "swiglu", "unit_rotary")
# Units in the last place, relative to the largest number of a tensor.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
EPS = 1e-5

each_op = pytest.mark.parametrize("name", NAMES)
each_type = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(
    name: str, size: int, dtype: torch.dtype
) -> tuple[list[Tensor], Callable[..., Callable[..., Tensor]]]:
    """Inputs to differentiate, and what makes a backend a function of them."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if name == "swiglu":
        # Slices of one tensor.
        both = numbers(3, 5, 2 * size + 3, dtype=dtype)
        return [2 * both[..., :size], both[..., size + 3 :]], lambda f: f
    if name == "rms_norm":
        x, gain = numbers(3, 5, size, dtype=dtype), 1 + numbers(size, dtype=real)
        return [x, gain], lambda f: lambda x, gain: f(x, gain, EPS, x.dtype)
    heads, half = 3, (size + 1) // 2
    packed = numbers(2, 5, heads * 2 * half + 4, dtype=dtype)
    x = packed[..., 4:].unflatten(-1, (heads, 2 * half)).transpose(1, 2)
    angles = numbers(2, 5, half, dtype=real)

    def rotary(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, s: f(x, s, angles.cos().to(s.dtype), angles.sin().to(s.dtype))

    return [x, 1 + numbers(heads, dtype=real).abs()], rotary


def outcome(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and all gradients of a fixed weighting of it, in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    # Rounded to bfloat16, so that every precision is given the same upstream gradient.
    upstream = numbers(*y.shape, dtype=torch.bfloat16, seed=9).to(y.dtype)
    return [x.detach().double() for x in (y, *torch.autograd.grad(y, leaves, upstream))]


def assert_close(ours: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, right, strict=True):
        error = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
        assert error.item() <= tolerance


def torch_form(name: str) -> Callable[..., Tensor]:
    return OPS[name].backends["torch"]


@pytest.mark.parametrize("size", [2, 3, 17, 76, 257])
@each_type
@each_op
def test_equals_the_oracle(name: str, dtype: torch.dtype, size: int) -> None:
    inputs, bind = problem(name, size, dtype)
    ours = outcome(bind(torch_form(name)), inputs)
    right = outcome(bind(OPS[name].backends["naive"]), [x.double() for x in inputs])
    # The gate of SwiGLU is in the type of its inputs, and so rounded twice.
    assert_close(ours, right, TOLERANCE[dtype])


def test_the_norm_is_that_of_torch() -> None:
    x, gain = numbers(4, 9, dtype=torch.float32), numbers(9, dtype=torch.float32, seed=1)
    y = torch_form("rms_norm")(x, gain, EPS, torch.float32)
    torch.testing.assert_close(y, F.rms_norm(x, (9,), gain, EPS), rtol=1e-5, atol=1e-6)


def test_a_float32_input_normed_to_bfloat16_is_rounded_once() -> None:
    x, gain = numbers(8, 31, dtype=torch.float32), numbers(31, dtype=torch.float32, seed=1)
    norm = torch_form("rms_norm")
    y = norm(x, gain, EPS, torch.bfloat16)
    exact = norm(x.double(), gain.double(), EPS, torch.float64)
    assert y.dtype == torch.bfloat16
    # Half a unit of bfloat16, and the float32 arithmetic before it.
    assert ((y.double() - exact).abs() <= exact.abs() * (2.0**-8 + 1e-5)).all()


def test_gains_of_bfloat16_get_gradients_of_bfloat16() -> None:
    x = numbers(4, 9, dtype=torch.bfloat16).requires_grad_()
    gain = torch.ones(9, dtype=torch.bfloat16, requires_grad=True)
    torch_form("rms_norm")(x, gain, EPS, torch.bfloat16).sum().backward()
    assert x.grad is not None
    assert gain.grad is not None
    assert x.grad.dtype == gain.grad.dtype == torch.bfloat16


@each_op
def test_zeros_give_zeros_and_finite_gradients(name: str) -> None:
    inputs, bind = problem(name, 8, torch.float32)
    zeros = [torch.zeros_like(x) if x.dim() > 2 else x for x in inputs]
    y, *gradients = outcome(bind(torch_form(name)), zeros)
    assert not y.any()
    assert all(x.isfinite().all() for x in gradients)


@each_op
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(name: str, bad: float) -> None:
    inputs, bind = problem(name, 16, torch.float32)
    x = inputs[0].clone()
    x[1, 0, 3] = bad
    y, clean = (bind(torch_form(name))(first, *inputs[1:]) for first in (x, inputs[0]))
    assert not y[1].isfinite().all()
    assert torch.equal(y[0], clean[0])


@each_op
def test_only_the_inputs_are_kept_for_the_way_back(name: str) -> None:
    inputs, bind = problem(name, 64, torch.float32)
    leaves = [x.detach().requires_grad_() for x in inputs]
    kept: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        bind(torch_form(name))(*leaves)
    inside = {x.untyped_storage().data_ptr() for x in leaves}
    larger = [x for x in kept if x.numel() >= inputs[0].numel()]
    assert larger
    assert all(x.untyped_storage().data_ptr() in inside for x in larger)


@each_op
def test_a_graph_without_breaks(name: str) -> None:
    inputs, bind = problem(name, 16, torch.float32)
    function = bind(torch_form(name))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(outcome(compiled, inputs), outcome(function, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
