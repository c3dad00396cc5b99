"""The scan with its gated input: every backend against the equation, values and all gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, gated_scan

BACKENDS = sorted(x for x in OPS["gated_scan"].backends if OPS["gated_scan"].runs_on(x, "cpu"))
SHAPES = [(1, 1, 1), (2, 63, 17), (4, 7, 33), (3, 500, 5)]
NAMES = ("gate", "value", "a", "b", "h0")
GatedScan = Callable[..., tuple[Tensor, Tensor]]

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fast_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "naive"])


def backend_function(name: str) -> GatedScan:
    return OPS["gated_scan"].backends[name]


def problem(B: int, T: int, n: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The five differentiated inputs: numbers of float32 (of bfloat16, gate and value)."""
    generator = torch.Generator().manual_seed(1000 * B + 10 * T + n)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    a = 0.1 + 0.899 * torch.rand(n, generator=generator)
    a[-1] = 0.999
    return {
        "gate": (3 * torch.randn(B, T, n, generator=generator)).to(dtype),
        "value": torch.randn(B, T, n, generator=generator).to(dtype),
        "a": a.to(state),
        "b": (1 - a.double() ** 2).sqrt().float().to(state),
        "h0": torch.randn(B, n, generator=generator).to(state),
    }


def flags(kind: str, B: int, T: int) -> tuple[Tensor | None, Tensor | None]:
    """Document starts and the mask of tokens."""
    if kind == "none":
        return None, None
    generator = torch.Generator().manual_seed(T)
    starts = torch.rand(B, T, generator=generator) < 0.2
    mask = torch.rand(B, T, generator=generator) < 0.8
    return (starts, None) if kind == "starts" else (starts, mask)


def values_and_gradients(
    function: GatedScan,
    inputs: dict[str, Tensor],
    starts: Tensor | None,
    mask: Tensor | None,
    with_h0: bool = True,
) -> dict[str, Tensor]:
    """h, h_last and the gradients of a fixed weighting of both, all as float64."""
    wanted = [name for name in NAMES if with_h0 or name != "h0"]
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in wanted}
    h, h_last = function(*(leaves.get(name) for name in NAMES), starts, mask)
    generator = torch.Generator().manual_seed(7)
    # Rounded to bfloat16, so that every precision is given the same upstream gradient exactly.
    w, w_last = (torch.randn(x.shape, generator=generator).bfloat16() for x in (h, h_last))
    total = (h.double() * w.double()).sum() + (h_last.double() * w_last.double()).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    results = {"h": h, "h_last": h_last}
    results |= {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}
    return {name: x.detach().double() for name, x in results.items()}


@functools.cache
def oracle(
    shape: tuple[int, int, int], kind: str, with_h0: bool, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the equation says in float64, and the size against which errors are measured.

    The gradients of a and b are sums of terms of both signs: their size is that of the terms'.
    """
    inputs = {name: x.double() for name, x in problem(*shape, dtype).items()}
    starts, mask = flags(kind, *shape[:2])
    exact = values_and_gradients(backend_function("naive"), inputs, starts, mask, with_h0)
    sizes = {name: float(x.abs().max().clamp_min(1e-30)) for name, x in exact.items()}
    g = exact["dvalue"] / (inputs["gate"].sigmoid() * inputs["b"])
    sizes["da"] = float((g * exact["h"]).abs().sum((0, 1)).max().clamp_min(1e-30))
    terms = exact["dvalue"] * inputs["value"] / inputs["b"]
    sizes["db"] = float(terms.abs().sum((0, 1)).max().clamp_min(1e-30))
    return exact, sizes


def errors(
    actual: dict[str, Tensor], expected: dict[str, Tensor], sizes: dict[str, float]
) -> dict[str, float]:
    assert actual.keys() == expected.keys()
    return {
        name: float((actual[name] - y).abs().max()) / sizes[name] for name, y in expected.items()
    }


@each_backend
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("kind", ["none", "starts", "starts and mask"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_oracle(
    backend: str, shape: tuple[int, int, int], kind: str, with_h0: bool
) -> None:
    starts, mask = flags(kind, *shape[:2])
    expected, sizes = oracle(shape, kind, with_h0, torch.float32)
    for dtype in (torch.float32, torch.float64):
        inputs = {name: x.to(dtype) for name, x in problem(*shape, torch.float32).items()}
        actual = values_and_gradients(backend_function(backend), inputs, starts, mask, with_h0)
        # As for the scan, T / 4 units, and some more for the gate.
        limit = torch.finfo(dtype).eps * (8 + shape[1] / 4)
        found = errors(actual, expected, sizes)
        assert max(found.values()) <= limit, (dtype, found)


@each_backend
@pytest.mark.parametrize("kind", ["none", "starts and mask"])
def test_bfloat16(backend: str, kind: str) -> None:
    shape = (2, 63, 17)
    starts, mask = flags(kind, *shape[:2])
    expected, sizes = oracle(shape, kind, True, torch.bfloat16)
    inputs = problem(*shape, torch.bfloat16)
    h, h_last = backend_function(backend)(*inputs.values(), starts, mask)
    assert h.dtype == torch.bfloat16
    assert h_last.dtype == torch.float32
    actual = values_and_gradients(backend_function(backend), inputs, starts, mask)
    found = errors(actual, expected, sizes)
    # One rounding to bfloat16 is half a unit, 2^-9 of a value; torch rounds after each operation.
    # So does Triton's stand-in on a CPU; tests of its kernels are their own.
    limit = 2**-6 if backend == "torch" or backend.startswith("triton") else 2**-8
    assert max(found.values()) <= limit, found
    if backend == "numba":
        # What does not leave in bfloat16 never was in it. (da multiplies by the rounded h.)
        assert max(found[name] for name in ("h_last", "db", "dh0")) <= 2e-6, found
        for name in ("h", "dgate", "dvalue"):
            wrong = (actual[name] - expected[name]).abs() - 2**-8 * expected[name].abs()
            assert float(wrong.max()) <= 2e-6 * sizes[name], name


@each_fast_backend
@pytest.mark.parametrize("wanted", [*NAMES, "all"])
@pytest.mark.parametrize("kind", ["none", "starts and mask"])
def test_gradcheck(backend: str, wanted: str, kind: str) -> None:
    starts, mask = flags(kind, 2, 7)
    inputs = [x.requires_grad_(wanted in (name, "all")) for name, x in problem(2, 7, 3).items()]
    assert torch.autograd.gradcheck(
        lambda *x: backend_function(backend)(*x, starts, mask),
        inputs,
        eps=1e-6,
        atol=1e-7,
        rtol=1e-7,
    )


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strided_inputs(backend: str, dtype: torch.dtype) -> None:
    inputs = problem(3, 21, 10, dtype)
    starts, mask = flags("starts and mask", 3, 21)
    function = backend_function(backend)

    def halves_of_one(gate: Tensor, value: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        gate, value = torch.cat([gate, value], -1).chunk(2, -1)
        assert not gate.is_contiguous()
        return function(gate, value, *rest)

    def transposed(gate: Tensor, value: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        gate, value = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (gate, value))
        return function(gate, value, *rest)

    expected = values_and_gradients(function, inputs, starts, mask)
    sizes = {name: float(x.abs().max()) for name, x in expected.items()}
    # Other strides may take another vector loop, fused or not: a few roundings.
    limit = 4 * torch.finfo(inputs["a"].dtype).eps if dtype != torch.bfloat16 else 2**-8
    for strided in (halves_of_one, transposed):
        actual = values_and_gradients(strided, inputs, starts, mask)
        assert max(errors(actual, expected, sizes).values()) <= limit


@each_backend
def test_nothing_enters_where_the_mask_is_false(backend: str) -> None:
    inputs = problem(2, 9, 5, torch.float32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3:6] = False
    changed = {name: x.clone() for name, x in inputs.items()}
    changed["gate"][0, 3:6] = 7.0
    changed["value"][0, 3:6] = -9.0
    first = values_and_gradients(backend_function(backend), inputs, None, mask)
    second = values_and_gradients(backend_function(backend), changed, None, mask)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("dgate", "dvalue"):
        assert torch.equal(first[name][0, 3:6], torch.zeros(3, 5, dtype=torch.float64))


@each_backend
def test_gates_far_open_and_far_closed(backend: str) -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 100.0, 1e4]).view(1, -1, 1)
    leaf = gate.clone().requires_grad_()
    # With a decay of zero each output is its own input.
    h, _ = backend_function(backend)(leaf, torch.ones_like(gate), torch.zeros(1), torch.ones(1))
    exact = gate.double().sigmoid()
    torch.testing.assert_close(h.double(), exact, rtol=4e-7, atol=1e-37)
    (dgate,) = torch.autograd.grad(h.sum(), leaf)
    # 1 - s has the absolute precision of s where the gate is open.
    torch.testing.assert_close(dgate.double(), exact * (1 - exact), rtol=4e-7, atol=1e-7)


@each_backend
def test_not_a_number_is_not_hidden(backend: str) -> None:
    inputs = problem(1, 4, 3, torch.bfloat16)
    inputs["gate"][0, 2, 1] = float("nan")
    h, h_last = backend_function(backend)(*inputs.values())
    assert torch.equal(h.isnan()[0, :, 1], torch.tensor([False, False, True, True]))
    assert not h.isnan()[..., [0, 2]].any()
    assert h_last.isnan().tolist() == [[False, True, False]]


@each_backend
def test_the_public_function_runs_the_forced_backend(backend: str) -> None:
    inputs = problem(2, 7, 5, torch.float32).values()
    with OPS["gated_scan"].force(backend):
        h, h_last = gated_scan(*inputs)
    expected, expected_last = backend_function(backend)(*inputs)
    assert torch.equal(h, expected)
    assert torch.equal(h_last, expected_last)
