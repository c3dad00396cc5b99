"""The recurrence h_t = a * h_{t-1} + u_t: every backend against the oracle and closed forms."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, scan

BACKENDS = sorted(x for x in OPS["scan"].backends if OPS["scan"].runs_on(x, "cpu"))
SHAPES = [(1, 1, 1), (1, 2, 16), (2, 63, 17), (4, 7, 33), (3, 500, 5)]
ScanFunction = Callable[..., tuple[Tensor, Tensor]]

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def backend_function(name: str) -> ScanFunction:
    return OPS["scan"].backends[name]


def problem(
    B: int, T: int, n: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """u, a and h0; the decays reach from fast (0.1) to slow (0.999) states."""
    generator = torch.Generator().manual_seed(1000 * B + 10 * T + n)
    u = torch.randn(B, T, n, generator=generator).to(dtype)
    a = 0.1 + 0.899 * torch.rand(n, generator=generator, dtype=torch.float64)
    a[-1] = 0.999
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    h0 = torch.randn(B, n, generator=generator).to(state_dtype)
    return u, a.to(state_dtype), h0


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
    function: ScanFunction, u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
) -> dict[str, Tensor]:
    """h, h_last and the gradients of a fixed weighting of both, all as float64."""
    leaves = {"u": u, "a": a} | ({} if h0 is None else {"h0": h0})
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    h, h_last = function(leaves["u"], leaves["a"], leaves.get("h0"), starts)
    generator = torch.Generator().manual_seed(7)
    # Rounded to bfloat16, so that every precision is given the same upstream gradient exactly.
    w, w_last = (torch.randn(x.shape, generator=generator).bfloat16() for x in (h, h_last))
    total = (h.double() * w.double()).sum() + (h_last.double() * w_last.double()).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    results = {"h": h, "h_last": h_last}
    results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: x.detach().double() for name, x in results.items()}


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, over its largest magnitude.

    da = sum_t du_t h_{t-1} has terms of both signs: it is measured against the sum of their sizes.
    """
    assert actual.keys() == expected.keys()
    sizes = {name: y.abs().max() for name, y in expected.items()}
    sizes["da"] = (expected["du"] * expected["h"]).abs().sum((0, 1)).max()
    return {
        name: float((actual[name] - y).abs().max() / sizes[name].clamp_min(1e-30))
        for name, y in expected.items()
    }


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
@pytest.mark.parametrize("starts_kind", ["none", "first", "consecutive", "random"])
@pytest.mark.parametrize("with_h0", [False, True])
def test_equals_unrolled_sum(backend: str, starts_kind: str, with_h0: bool) -> None:
    u, a, h0 = problem(2, 9, 5)
    starts = make_starts(starts_kind, 2, 9)
    expected = unrolled(u, a, h0 if with_h0 else None, starts)
    h, h_last = backend_function(backend)(u, a, h0 if with_h0 else None, starts)
    # Nine terms of order one in float64: a few units in the last place.
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(h_last, expected[:, -1], rtol=0, atol=1e-14)


CASES = [
    (shape, kind, with_h0)
    for shape in SHAPES
    for kind in ("none", "first", "consecutive", "random", "all")
    for with_h0 in (False, True)
    if shape[1] < 100 or kind in ("none", "random")
]


@functools.cache
def oracle(shape: tuple[int, int, int], starts_kind: str, with_h0: bool) -> dict[str, Tensor]:
    """What the oracle says in float64 about the numbers of the float32 problem."""
    u, a, h0 = (x.double() for x in problem(*shape, torch.float32))
    starts = make_starts(starts_kind, *shape[:2])
    return values_and_gradients(backend_function("naive"), u, a, h0 if with_h0 else None, starts)


@each_backend
@pytest.mark.parametrize(("shape", "starts_kind", "with_h0"), CASES)
def test_matches_oracle(
    backend: str, shape: tuple[int, int, int], starts_kind: str, with_h0: bool
) -> None:
    starts = make_starts(starts_kind, *shape[:2])
    expected = oracle(shape, starts_kind, with_h0)
    for dtype in (torch.float32, torch.float64):
        u, a, h0 = (x.to(dtype) for x in problem(*shape, torch.float32))
        actual = values_and_gradients(
            backend_function(backend), u, a, h0 if with_h0 else None, starts
        )
        # A step adds half a unit of rounding, and the slowest states remember all of them: T / 2
        # units at the worst, half of that here.
        limit = torch.finfo(dtype).eps * (4 + shape[1] / 4)
        errors = relative_errors(actual, expected)
        assert max(errors.values()) <= limit, (dtype, errors)


@each_backend
@pytest.mark.parametrize("starts_kind", ["none", "random"])
def test_bfloat16_input_keeps_a_float32_state(backend: str, starts_kind: str) -> None:
    shape = (2, 63, 17)
    u, a, h0 = problem(*shape, torch.bfloat16)
    starts = make_starts(starts_kind, *shape[:2])
    h, h_last = backend_function(backend)(u, a, h0, starts)
    assert h.dtype == torch.bfloat16
    assert h_last.dtype == torch.float32
    actual = values_and_gradients(backend_function(backend), u, a, h0, starts)
    expected = values_and_gradients(
        OPS["scan"].backends["naive"], u.double(), a.double(), h0.double(), starts
    )
    # The state itself never passes through bfloat16: it is as good as with float32 inputs.
    assert relative_errors(actual, expected)["h_last"] <= 1e-6
    # h and du are rounded to bfloat16 once on the way out: half a unit, 2^-8 of each value.
    for name in ("h", "du"):
        slack = 1e-6 * expected[name].abs().max()
        wrong = (actual[name] - expected[name]).abs() - 2**-8 * expected[name].abs()
        assert float(wrong.max()) <= slack, name
    # dh0 comes from float32 states alone; da multiplies by h as saved, rounded by up to 2^-8.
    assert relative_errors(actual, expected)["dh0"] <= 1e-6
    assert relative_errors(actual, expected)["da"] <= 2**-8


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

    h, h_last = backend_function(backend)(u, a)
    # A state that remembers 1000 steps averages float32 rounding.
    assert error(h_last) <= 1e-5
    assert error(h[:, -1]) <= 2**-8
    # The control: in bfloat16, 0.999 itself is 1.0 and the sum stalls.
    assert error(rough) > 0.1


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "naive"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("starts_kind", ["none", "consecutive"])
def test_gradcheck(backend: str, wanted: tuple[int, ...], starts_kind: str) -> None:
    inputs = [x.requires_grad_(i in wanted) for i, x in enumerate(problem(2, 7, 3))]
    starts = make_starts(starts_kind, 2, 7)
    # Central differences of a polynomial with step 1e-6 in float64 are good to about 1e-9.
    assert torch.autograd.gradcheck(
        lambda u, a, h0: backend_function(backend)(u, a, h0, starts),
        inputs,
        eps=1e-6,
        atol=1e-7,
        rtol=1e-7,
    )


@each_backend
@pytest.mark.parametrize("pieces", [[1, 62], [20, 20, 23], [1] * 63])
def test_pieces_with_carried_state_equal_the_whole(backend: str, pieces: list[int]) -> None:
    u, a, h0 = problem(2, 63, 17)
    starts = make_starts("random", 2, 63)

    def in_pieces(u: Tensor, a: Tensor, h0: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        assert starts is not None
        outputs, state = [], h0
        for piece, mask in zip(u.split(pieces, 1), starts.split(pieces, 1), strict=True):
            h, state = backend_function(backend)(piece, a, state, mask)
            outputs.append(h)
        return torch.cat(outputs, 1), state

    whole = values_and_gradients(backend_function(backend), u, a, h0, starts)
    carried = values_and_gradients(in_pieces, u, a, h0, starts)
    # The same float64 operations; only the order of the sum for da differs.
    assert max(relative_errors(carried, whole).values()) <= 1e-14


@each_backend
@pytest.mark.parametrize("lengths", [[5, 1, 1, 30, 26], [63], [1, 62]])
def test_packed_documents_equal_separate_ones(backend: str, lengths: list[int]) -> None:
    u, a, _ = problem(1, 63, 17)
    starts = torch.zeros(1, 63, dtype=torch.bool)
    starts[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True

    def separate(
        u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        results = [backend_function(backend)(piece, a) for piece in u.split(lengths, 1)]
        return torch.cat([h for h, _ in results], 1), results[-1][1]

    packed = values_and_gradients(backend_function(backend), u, a, None, starts)
    apart = values_and_gradients(separate, u, a, None, None)
    assert max(relative_errors(packed, apart).values()) <= 1e-14


@each_backend
def test_a_start_at_zero_forgets_the_given_state(backend: str) -> None:
    u, a, h0 = problem(2, 7, 5)
    starts = make_starts("first", 2, 7)
    h0.requires_grad_()
    h, h_last = backend_function(backend)(u, a, h0, starts)
    without, _ = backend_function(backend)(u, a)
    assert torch.equal(h, without)
    (gradient,) = torch.autograd.grad(h.sum() + h_last.sum(), h0)
    assert torch.equal(gradient, torch.zeros_like(h0))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_non_contiguous_inputs(backend: str, dtype: torch.dtype) -> None:
    u, a, h0 = problem(3, 21, 10, dtype)
    starts = make_starts("random", 3, 21)
    assert starts is not None

    def strided(
        u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert h0 is not None
        assert starts is not None
        u = u.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        a = a.repeat_interleave(2)[::2]
        h0, starts = h0.T.contiguous().T, starts.T.contiguous().T
        assert not any(x.is_contiguous() for x in (u, a, h0, starts))
        return backend_function(backend)(u, a, h0, starts)

    actual = values_and_gradients(strided, u, a, h0, starts)
    expected = values_and_gradients(backend_function(backend), u, a, h0, starts)
    # Other strides may take another vector loop, fused or not: one rounding of the state type.
    limit = 2 * torch.finfo(a.dtype).eps if dtype != torch.bfloat16 else 2**-8
    assert max(relative_errors(actual, expected).values()) <= limit


@each_backend
def test_gradient_through_the_last_state_alone(backend: str) -> None:
    u, a, h0 = (x.requires_grad_() for x in problem(2, 7, 5))
    _, h_last = backend_function(backend)(u, a, h0)
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
    u, a, h0 = (x.requires_grad_() for x in problem(1, 6, 4))
    h, _ = backend_function(backend)(u, a, h0)
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
    u, a, h0 = problem(2, 7, 5, dtype)
    starts = make_starts("consecutive", 2, 7)
    assert starts is not None
    before = [x.clone() for x in (u, a, h0, starts)]
    h, h_last = backend_function(backend)(u, a, h0, starts)
    assert all(torch.equal(x, y) for x, y in zip((u, a, h0, starts), before, strict=True))
    kept = h.clone()
    h_last.fill_(99.0)
    assert torch.equal(h, kept)


@each_backend
def test_the_public_function_runs_the_forced_backend(backend: str) -> None:
    u, a, h0 = problem(2, 7, 5, torch.float32)
    with OPS["scan"].force(backend):
        h, h_last = scan(u, a, h0)
    expected, expected_last = backend_function(backend)(u, a, h0)
    assert torch.equal(h, expected)
    assert torch.equal(h_last, expected_last)
