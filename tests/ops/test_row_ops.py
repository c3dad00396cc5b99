"""Norms, rotation and gates: the closed forms against the equations, and what they keep."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops import OPS
from tests.ops.common import Function, Inputs, converted, outcome, worst

NAMES = ("rms_norm", "swiglu", "unit_rotary")
# Units in the last place, relative to the largest number of a tensor.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
EPS = 1e-5

each_op = pytest.mark.parametrize("name", NAMES)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(name: str, size: int, dtype: torch.dtype) -> Inputs:
    """Inputs by name; the tensors to differentiate are slices of wider ones where they can be."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if name == "swiglu":
        both = numbers(3, 5, 2 * size + 3, dtype=dtype)
        return {"gate": 2 * both[..., :size], "up": both[..., size + 3 :]}
    if name == "rms_norm":
        gain = 1 + numbers(size, dtype=real)
        return {"x": numbers(3, 5, size, dtype=dtype), "gain": gain}
    heads, half = 3, (size + 1) // 2
    x = numbers(2, 5, heads * 2 * half + 4, dtype=dtype)[..., 4:]
    x = x.unflatten(-1, (heads, 2 * half)).transpose(1, 2)
    return {"x": x, "scales": 1 + numbers(heads, dtype=real).abs()}


def backend(name: str, kind: str, size: int, dtype: torch.dtype) -> Function:
    """A backend with what is not differentiated filled in."""
    function = OPS[name].backends[kind]
    if name == "swiglu":
        return function
    if name == "rms_norm":
        return functools.partial(function, eps=EPS, dtype=dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    angles = numbers(2, 5, (size + 1) // 2, dtype=torch.float32).to(real)
    return functools.partial(function, cos=angles.cos(), sin=angles.sin())


def ours(name: str, size: int, dtype: torch.dtype = torch.float32) -> tuple[Function, Inputs]:
    return backend(name, "torch", size, dtype), problem(name, size, dtype)


@pytest.mark.parametrize("size", [2, 3, 17, 76, 257])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@each_op
def test_equals_the_oracle(name: str, dtype: torch.dtype, size: int) -> None:
    actual = outcome(*ours(name, size, dtype))
    exact = converted(problem(name, size, dtype), torch.float64)
    expected = outcome(backend(name, "naive", size, torch.float64), exact)
    # The gate of SwiGLU is in the type of its inputs, and so rounded twice.
    assert worst(actual, expected) <= TOLERANCE[dtype]


def torch_norm(x: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    return OPS["rms_norm"].backends["torch"](x, gain, EPS, dtype)


def test_the_norm_is_that_of_torch() -> None:
    x, gain = numbers(4, 9, dtype=torch.float32), numbers(9, dtype=torch.float32, seed=1)
    y = torch_norm(x, gain, torch.float32)
    torch.testing.assert_close(y, F.rms_norm(x, (9,), gain, EPS), rtol=1e-5, atol=1e-6)


def test_a_float32_input_normed_to_bfloat16_is_rounded_once() -> None:
    x, gain = numbers(8, 31, dtype=torch.float32), numbers(31, dtype=torch.float32, seed=1)
    y = torch_norm(x, gain, torch.bfloat16)
    exact = torch_norm(x.double(), gain.double(), torch.float64)
    assert y.dtype == torch.bfloat16
    # Half a unit of bfloat16, and the float32 arithmetic before it.
    assert ((y.double() - exact).abs() <= exact.abs() * (2.0**-8 + 1e-5)).all()


def test_gains_of_bfloat16_get_gradients_of_bfloat16() -> None:
    x = numbers(4, 9, dtype=torch.bfloat16).requires_grad_()
    gain = torch.ones(9, dtype=torch.bfloat16, requires_grad=True)
    torch_norm(x, gain, torch.bfloat16).sum().backward()
    assert x.grad is not None
    assert gain.grad is not None
    assert x.grad.dtype == gain.grad.dtype == torch.bfloat16


@each_op
def test_zeros_give_zeros_and_finite_gradients(name: str) -> None:
    function, inputs = ours(name, 8)
    zeros = {key: torch.zeros_like(x) if x.dim() > 2 else x for key, x in inputs.items()}
    results = outcome(function, zeros)
    assert not results["y"].any()
    assert all(x.isfinite().all() for x in results.values())


@each_op
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(name: str, bad: float) -> None:
    function, inputs = ours(name, 16)
    first = next(iter(inputs))
    x = inputs[first].clone()
    x[1, 0, 3] = bad
    y, clean = function(**(inputs | {first: x})), function(**inputs)
    assert not y[1].isfinite().all()
    assert torch.equal(y[0], clean[0])


@each_op
def test_only_the_inputs_are_kept_for_the_way_back(name: str) -> None:
    function, inputs = ours(name, 64)
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    kept: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        function(**leaves)
    inside = {x.untyped_storage().data_ptr() for x in leaves.values()}
    larger = [x for x in kept if x.numel() >= next(iter(leaves.values())).numel()]
    assert larger
    assert all(x.untyped_storage().data_ptr() in inside for x in larger)


@each_op
def test_a_graph_without_breaks(name: str) -> None:
    function, inputs = ours(name, 16)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert worst(outcome(compiled, inputs), outcome(function, inputs)) <= 1e-6
