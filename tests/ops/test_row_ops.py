"""Norms, rotation and gates as passes over rows: every backend against the equations."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops import OPS, numba_runtime

NAMES = ("mixed_norms", "swiglu", "unit_rotary")
BACKENDS = [(name, backend) for name in NAMES for backend in sorted(OPS[name].backends)]
FAST = [pair for pair in BACKENDS if pair[1] != "naive"]
# Units in the last place, relative to the largest number of a tensor.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-8}
EPS = 1e-5

each_fast_backend = pytest.mark.parametrize(("name", "backend"), FAST)
each_type = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(autouse=True)
def kernels_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_runtime, "SMALL", 1)
    monkeypatch.setattr(numba_runtime, "WAKING", 1)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(
    name: str, size: int, dtype: torch.dtype
) -> tuple[list[Tensor], Callable[..., Callable[..., Tensor]]]:
    """Inputs to differentiate, and what makes a backend a function of them."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if name == "swiglu":
        # Slices of one tensor, as the packed projection gives them.
        both = numbers(3, 5, 2 * size + 3, dtype=dtype)
        return [2 * both[..., :size], both[..., size + 3 :]], lambda f: f
    if name == "mixed_norms":
        ys = [numbers(3, 5, size, dtype=dtype, seed=i) for i in range(3)]
        gains = [1 + numbers(size, dtype=real, seed=i) for i in range(3)]
        weights = numbers(3, dtype=real).softmax(0)

        def norms(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *x: f(x[:3], x[3:6], x[6], EPS, x[0].dtype)

        return [*ys, *gains, weights], norms
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


@pytest.mark.parametrize("size", [2, 3, 17, 76, 257])
@each_type
@each_fast_backend
def test_equals_the_oracle(name: str, backend: str, dtype: torch.dtype, size: int) -> None:
    inputs, bind = problem(name, size, dtype)
    ours = outcome(bind(OPS[name].backends[backend]), inputs)
    right = outcome(bind(OPS[name].backends["naive"]), [x.double() for x in inputs])
    # PyTorch rounds to bfloat16 after each of its operations.
    rounded = dtype == torch.bfloat16 and backend == "torch"
    assert_close(ours, right, TOLERANCE[dtype] * (8 if rounded else 1))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads(name: str, threads: int) -> None:
    inputs, bind = problem(name, 33, torch.float32)
    function = bind(OPS[name].backends["numba"])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, again = outcome(function, inputs), outcome(function, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    right = outcome(bind(OPS[name].backends["naive"]), [x.double() for x in inputs])
    assert_close(first, right, TOLERANCE[torch.float32])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_norms_of_any_number_with_weights_of_one(backend: str, count: int) -> None:
    ys = [numbers(4, 9, dtype=torch.float32, seed=i) for i in range(count)]
    gains = [numbers(9, dtype=torch.float32, seed=-i) for i in range(count)]
    y = OPS["mixed_norms"].backends[backend](ys, gains, None, EPS, torch.float32)
    right = sum(F.rms_norm(y, (9,), gain, EPS) for y, gain in zip(ys, gains, strict=True))
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_float32_input_normed_to_bfloat16_is_rounded_once(backend: str) -> None:
    x, gain = numbers(8, 31, dtype=torch.float32), numbers(31, dtype=torch.float32, seed=1)
    norm = OPS["mixed_norms"].backends[backend]
    y = norm((x,), (gain,), None, EPS, torch.bfloat16)
    exact = norm((x.double(),), (gain.double(),), None, EPS, torch.float64)
    assert y.dtype == torch.bfloat16
    # Half a unit of bfloat16, and the float32 arithmetic before it.
    assert ((y.double() - exact).abs() <= exact.abs() * (2.0**-8 + 1e-5)).all()


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_gains_of_bfloat16_get_gradients_of_bfloat16(backend: str) -> None:
    x = numbers(4, 9, dtype=torch.bfloat16).requires_grad_()
    gain = torch.ones(9, dtype=torch.bfloat16, requires_grad=True)
    y = OPS["mixed_norms"].backends[backend]((x,), (gain,), None, EPS, torch.bfloat16)
    y.sum().backward()
    assert x.grad.dtype == gain.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "backend"), FAST)
def test_zeros_give_zeros_and_finite_gradients(name: str, backend: str) -> None:
    inputs, bind = problem(name, 8, torch.float32)
    zeros = [torch.zeros_like(x) if x.dim() > 2 else x for x in inputs]
    y, *gradients = outcome(bind(OPS[name].backends[backend]), zeros)
    assert not y.any()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize(("name", "bad"), itertools.product(NAMES, [float("nan"), float("inf")]))
def test_what_is_not_finite_stays_in_its_row(name: str, bad: float) -> None:
    inputs, bind = problem(name, 16, torch.float32)
    x = inputs[0].clone()
    x[1, 0, 3] = bad
    y = bind(OPS[name].backends["numba"])(x, *inputs[1:])
    clean = bind(OPS[name].backends["numba"])(*inputs)
    assert not y[1].isfinite().all()
    assert torch.equal(y[0], clean[0])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_goes_to_torch(name: str) -> None:
    inputs, bind = problem(name, 16, torch.float32)
    halves = [x.half() for x in inputs]
    backends = OPS[name].backends
    assert torch.equal(bind(backends["numba"])(*halves), bind(backends["torch"])(*halves))


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_without_breaks(name: str) -> None:
    inputs, bind = problem(name, 16, torch.float32)
    function = bind(OPS[name].backends["numba"])
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(outcome(compiled, inputs), outcome(function, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_without_numba_torch_takes_over_and_says_so_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = numba_runtime.kernel, numba_runtime._warn
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(numba_runtime, "_FAULTS", {})
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "pha.ops.numba_rows", raising=False)
    inputs, bind = problem(name, 16, torch.float32)
    backends: dict[str, Any] = OPS[name].backends
    with pytest.warns(RuntimeWarning, match="norms and attention run several times") as seen:
        y = bind(backends["numba"])(*inputs)
    assert len(seen) == 1
    assert torch.equal(y, bind(backends["torch"])(*inputs))
    for cached in caches:
        cached.cache_clear()
