"""The scan with its gated input: every backend against the equation, values and all gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, gated_scan
from pha.utils.errors import PHAError

BACKENDS = sorted(x for x in OPS["gated_scan"].backends if OPS["gated_scan"].runs_on(x, "cpu"))
SHAPES = [(1, 1, 1), (2, 63, 17), (4, 7, 33), (3, 500, 5)]
NAMES = ("gate", "value", "a", "b", "h0")
GatedScan = Recurrence = Callable[..., tuple[Tensor, Tensor]]

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
        # T / 4 units for the recurrence, and some more for the gate.
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
    assert max(found.values()) <= 2**-8, found
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


# With its gates wide open, the scan is the linear recurrence h_t = a h_{t-1} + u_t.


def recurrence(backend: str) -> Recurrence:
    """The scan of u (B, T, n), a, h0 and starts, with a gate of exactly 1."""
    function = backend_function(backend)

    def run(
        u: Tensor, a: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return function(torch.full_like(u, 1e4), u, a, torch.ones_like(a), h0, starts)

    return run


def numbers(B: int, T: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, a and h0 in float64."""
    inputs = problem(B, T, n)
    return inputs["value"], inputs["a"], inputs["h0"]


def starts_of(kind: str, B: int, T: int) -> Tensor | None:
    """No starts, all at the first step, or some anywhere, three of them side by side."""
    if kind == "none":
        return None
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, 0] = kind == "first"
    if kind == "random":
        starts[0, 2 : min(T, 5)] = starts[-1, T // 2] = True
    return starts


def unrolled(u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None) -> Tensor:
    """h_t = sum over s of a^(t-s) u_s, over the steps of t's own document; no recurrence."""
    h = torch.zeros_like(u)
    for b in range(u.shape[0]):
        for t in range(u.shape[1]):
            begins = 0 if starts is None else int(starts[b, : t + 1].cumsum(0).argmax())
            fresh = starts is not None and bool(starts[b, : t + 1].any())
            for s in range(begins, t + 1):
                h[b, t] += a ** (t - s) * u[b, s]
            if h0 is not None and not fresh:
                h[b, t] += a ** (t + 1) * h0[b]
    return h


@each_backend
@pytest.mark.parametrize("starts_kind", ["none", "first", "random"])
@pytest.mark.parametrize("with_h0", [False, True])
def test_equals_unrolled_sum(backend: str, starts_kind: str, with_h0: bool) -> None:
    u, a, h0 = numbers(2, 9, 5)
    starts = starts_of(starts_kind, 2, 9)
    expected = unrolled(u, a, h0 if with_h0 else None, starts)
    h, h_last = recurrence(backend)(u, a, h0 if with_h0 else None, starts)
    # Nine terms of order one in float64: a few units in the last place.
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(h_last, expected[:, -1], rtol=0, atol=1e-14)


@each_backend
def test_long_bfloat16_scan_is_not_accumulated_in_bfloat16(backend: str) -> None:
    T, decay = 4096, 0.999
    u = (torch.randn(1, T, 3, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
    a = torch.full((3,), decay)
    exact = torch.zeros(1, 3, dtype=torch.float64)
    rough = torch.zeros(1, 3, dtype=torch.bfloat16)
    for t in range(T):
        exact = float(a[0]) * exact + u[:, t].double()
        rough = a.bfloat16() * rough + u[:, t]

    def error(x: Tensor) -> float:
        return float(((x.double() - exact) / exact).abs().max())

    h, h_last = recurrence(backend)(u, a)
    # A state that remembers 1000 steps averages float32 rounding.
    assert error(h_last) <= 1e-5
    assert error(h[:, -1]) <= 2**-8
    # The control: in bfloat16, 0.999 itself is 1.0 and the sum stalls.
    assert error(rough) > 0.1


@each_backend
def test_a_start_at_zero_forgets_the_given_state(backend: str) -> None:
    u, a, h0 = numbers(2, 7, 5)
    starts = starts_of("first", 2, 7)
    h0.requires_grad_()
    h, h_last = recurrence(backend)(u, a, h0, starts)
    without, _ = recurrence(backend)(u, a)
    assert torch.equal(h, without)
    (gradient,) = torch.autograd.grad(h.sum() + h_last.sum(), h0)
    assert torch.equal(gradient, torch.zeros_like(h0))


@each_backend
def test_gradient_through_the_last_state_alone(backend: str) -> None:
    u, a, h0 = (x.requires_grad_() for x in numbers(2, 7, 5))
    _, h_last = recurrence(backend)(u, a, h0)
    du, da, dh0 = torch.autograd.grad(h_last.sum(), (u, a, h0))
    # h_last = a^T h0 + sum_t a^(T-1-t) u_t, differentiated by hand.
    power = torch.arange(6, -1, -1, dtype=torch.float64)[:, None]
    atol = 1e-14
    torch.testing.assert_close(du, (a**power).expand(2, 7, 5).detach(), rtol=0, atol=atol)
    torch.testing.assert_close(dh0, (a**7).expand(2, 5).detach(), rtol=0, atol=atol)
    expected = (power * a ** (power - 1) * u).sum((0, 1)) + (7 * a**6 * h0).sum(0)
    torch.testing.assert_close(da, expected.detach(), rtol=0, atol=1e-13)


@each_backend
def test_gradient_through_the_outputs_alone(backend: str) -> None:
    u, a, h0 = (x.requires_grad_() for x in numbers(1, 6, 4))
    h, _ = recurrence(backend)(u, a, h0)
    # A sum hands back one expanded number as the gradient: no memory of its own.
    du, dh0 = torch.autograd.grad(h.sum(), (u, h0))
    powers = torch.stack([a**i for i in range(7)]).detach()
    expected = torch.stack([powers[: 6 - t].sum(0) for t in range(6)])
    torch.testing.assert_close(du[0], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(dh0[0], powers[1:].sum(0), rtol=0, atol=1e-14)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_stay_as_they_are_and_the_last_state_is_its_own(
    backend: str, dtype: torch.dtype
) -> None:
    u, a, h0 = [x.to(dtype) if i == 0 else x.float() for i, x in enumerate(numbers(2, 7, 5))]
    starts = starts_of("random", 2, 7)
    assert starts is not None
    before = [x.clone() for x in (u, a, h0, starts)]
    h, h_last = recurrence(backend)(u, a, h0, starts)
    assert all(torch.equal(x, y) for x, y in zip((u, a, h0, starts), before, strict=True))
    kept = h.clone()
    h_last.fill_(99.0)
    assert torch.equal(h, kept)


@each_backend
@pytest.mark.parametrize("pieces", [[1, 62], [20, 20, 23], [1] * 63])
def test_pieces_with_carried_state_equal_the_whole(backend: str, pieces: list[int]) -> None:
    inputs = problem(2, 63, 17)
    starts, mask = flags("starts and mask", 2, 63)

    def in_pieces(
        gate: Tensor, value: Tensor, a: Tensor, b: Tensor, state: Tensor, *flags: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = []
        for part in zip(*(x.split(pieces, 1) for x in (gate, value, *flags)), strict=True):
            h, state = backend_function(backend)(*part[:2], a, b, state, *part[2:])
            outputs.append(h)
        return torch.cat(outputs, 1), state

    whole = values_and_gradients(backend_function(backend), inputs, starts, mask)
    carried = values_and_gradients(in_pieces, inputs, starts, mask)
    _, sizes = oracle((2, 63, 17), "starts and mask", True, torch.float64)
    # Sums in another order: blocks of time are others in each piece.
    assert max(errors(carried, whole, sizes).values()) <= 1e-14


@each_backend
@pytest.mark.parametrize("lengths", [[5, 1, 1, 30, 26], [63], [1, 62]])
def test_packed_documents_equal_separate_ones(backend: str, lengths: list[int]) -> None:
    inputs = problem(1, 63, 17)
    starts = torch.zeros(1, 63, dtype=torch.bool)
    starts[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True

    def separate(
        gate: Tensor, value: Tensor, a: Tensor, b: Tensor, *_: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        pieces = zip(gate.split(lengths, 1), value.split(lengths, 1), strict=True)
        results = [backend_function(backend)(*piece, a, b) for piece in pieces]
        return torch.cat([h for h, _ in results], 1), results[-1][1]

    packed = values_and_gradients(backend_function(backend), inputs, starts, None, with_h0=False)
    apart = values_and_gradients(separate, inputs, None, None, with_h0=False)
    _, sizes = oracle((1, 63, 17), "none", False, torch.float64)
    assert max(errors(packed, apart, sizes).values()) <= 1e-14


@pytest.mark.parametrize("T", [*range(2, 12), 24, 25, 26, 63, 64, 65])
@pytest.mark.parametrize("kind", ["none", "starts and mask"])
def test_blocks_of_time_of_any_number(T: int, kind: str) -> None:
    inputs, flagged = problem(2, T, 3), flags(kind, 2, T)
    actual = values_and_gradients(backend_function("torch"), inputs, *flagged)
    expected, sizes = oracle((2, T, 3), kind, True, torch.float64)
    assert max(errors(actual, expected, sizes).values()) <= 1e-14


@pytest.mark.parametrize("name", ["gate", "a", "b", "h0", "starts", "mask"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    inputs: dict[str, Tensor] = problem(2, 7, 5)
    inputs["starts"] = inputs["mask"] = torch.ones(2, 7, dtype=torch.bool)
    inputs[name] = inputs[name][:1] if name in ("h0", "starts", "mask") else inputs[name][..., :4]
    with pytest.raises(PHAError, match=f"{name} is "):
        gated_scan(**inputs)


def test_as_an_operator_of_torch() -> None:
    inputs = [x.requires_grad_() for x in problem(2, 7, 3, torch.float32).values()]
    torch.library.opcheck(torch.ops.pha.gated_scan.default, (*inputs, *flags("starts", 2, 7)))
