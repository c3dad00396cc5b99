"""Scans with decays of the input: backends against sums written out, chunks, splits, precision."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, gated_scan, linear_scan, selective_scan
from pha.utils.errors import PHAError
from tests.ops.common import (
    Function,
    Inputs,
    cpu_backends,
    gradcheck,
    in_pieces,
    is_rounded_once,
    outcome,
    starts_of,
    worst,
)

SCANS: dict[str, Function] = {"linear_scan": linear_scan, "selective_scan": selective_scan}
OVER_TIME = ("u", "a", "x", "dt", "B", "C", "starts")
each_scan = pytest.mark.parametrize("op", SCANS)
each_backend = pytest.mark.parametrize(
    ("op", "backend"), [(op, name) for op in SCANS for name in cpu_backends(op)]
)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small problems have several."""
    module = importlib.import_module("pha.ops.selective_scan")
    monkeypatch.setattr(module, "SHORTEST", 5)
    monkeypatch.setattr(module, "NUMBERS", 0)


def problem(op: str, B: int, T: int, n: int, starts: bool = True, h0: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs: Inputs
    if op == "linear_scan":
        inputs = {"u": normal(B, T, n), "a": normal(B, T, n).sigmoid(), "h0": normal(B, n)}
    else:
        inputs = {"x": normal(B, T, n), "dt": normal(B, T, n).sigmoid(), "A": -normal(n, 4).exp()}
        inputs |= {"B": normal(B, T, 4), "C": normal(B, T, 4), "h0": normal(B, n, 4)}
    if not h0:
        del inputs["h0"]
    if starts:
        inputs["starts"] = torch.rand(B, T, generator=generator) < 0.2
    return inputs


def run(op: str, backend: str) -> Any:
    def function(**inputs: Any) -> Any:
        with OPS[op].force(backend):
            return SCANS[op](**inputs)

    return function


def unrolled(op: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Each state as the sum of what its document put in, times the decays since."""
    if op == "linear_scan":
        u, a = inputs["u"].unsqueeze(-1), inputs["a"].unsqueeze(-1)
    else:
        dt = inputs["dt"].unsqueeze(-1)
        a, u = (dt * inputs["A"]).exp(), dt * inputs["x"].unsqueeze(-1) * inputs["B"].unsqueeze(2)
    states, (B, T) = torch.zeros_like(u), u.shape[:2]
    for b in range(B):
        for t in range(T):
            begins = [s for s in range(t + 1) if "starts" in inputs and inputs["starts"][b, s]]
            for s in range(begins[-1] if begins else 0, t + 1):
                states[b, t] += u[b, s] * a[b, s + 1 : t + 1].prod(0)
            if "h0" in inputs and not begins:
                states[b, t] += inputs["h0"][b].view(states[b, t].shape) * a[b, : t + 1].prod(0)
    if op == "linear_scan":
        return states.squeeze(-1), states[:, -1].squeeze(-1)
    return (states * inputs["C"].unsqueeze(2)).sum(-1), states[:, -1]


@each_backend
@pytest.mark.parametrize("T", [1, 2, 5, 11])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("h0", [False, True])
def test_equals_the_unrolled_sums(op: str, backend: str, T: int, starts: bool, h0: bool) -> None:
    inputs = problem(op, 2, T, 3, starts, h0)
    for actual, expected in zip(run(op, backend)(**inputs), unrolled(op, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@each_scan
@pytest.mark.parametrize("T", [*range(2, 12), 24, 25, 26, 63, 64, 65])
@pytest.mark.parametrize("starts", [False, True])
def test_values_and_gradients_at_any_number_of_steps(op: str, T: int, starts: bool) -> None:
    inputs = problem(op, 2, T, 3, starts)
    assert worst(outcome(run(op, "torch"), inputs), outcome(run(op, "naive"), inputs)) <= 1e-13


@each_scan
def test_gradcheck(op: str) -> None:
    gradcheck(run(op, "torch"), problem(op, 2, 7, 2))


@each_backend
@pytest.mark.parametrize("lengths", [[1, 62], [20, 20, 23], [1] * 63])
def test_pieces_and_packed_documents(op: str, backend: str, lengths: list[int]) -> None:
    function, inputs = run(op, backend), problem(op, 2, 63, 3)
    carried = in_pieces(function, lengths, OVER_TIME)
    assert worst(outcome(carried, inputs), outcome(function, inputs)) <= 1e-13
    inputs = problem(op, 1, 63, 3, starts=False, h0=False)
    packed = outcome(function, inputs | {"starts": starts_of(lengths)})
    assert worst(packed, outcome(in_pieces(function, lengths, OVER_TIME), inputs)) <= 1e-13


@each_backend
def test_half_precision_is_rounded_once(op: str, backend: str) -> None:
    inputs = problem(op, 2, 63, 3)
    narrow = {"u", "x", "B", "C"}
    rounded = {
        k: v if v.dtype == torch.bool else v.bfloat16() if k in narrow else v.float()
        for k, v in inputs.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        y, last = run(op, backend)(**rounded)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    exact = {k: v if v.dtype == torch.bool else v.double() for k, v in rounded.items()}
    y_exact, last_exact = run(op, "naive")(**exact)
    assert is_rounded_once(y.double(), y_exact, 1e-6)
    torch.testing.assert_close(last.double(), last_exact, rtol=0, atol=1e-5)


@each_scan
def test_strided_inputs_and_gradients(op: str) -> None:
    inputs = problem(op, 2, 13, 3)
    strided = {k: v if k == "starts" else v.mT.contiguous().mT for k, v in inputs.items()}
    assert worst(outcome(run(op, "torch"), strided), outcome(run(op, "torch"), inputs)) <= 1e-14
    leaves = [v.float().requires_grad_() for k, v in inputs.items() if k != "starts"]
    y, _ = SCANS[op](*leaves)
    y.sum().backward()  # an expanded number, and none for the last state
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in leaves)


def test_a_constant_decay_is_the_gated_scan() -> None:
    inputs = problem("linear_scan", 2, 63, 3)
    a, wide_open = torch.tensor([0.1, 0.9, 0.999]).double(), torch.full_like(inputs["u"], 1e4)
    rest = inputs["h0"], inputs["starts"]
    h, last = linear_scan(inputs["u"], a.expand(2, 63, 3), *rest)
    expected, expected_last = gated_scan(wide_open, inputs["u"], a, torch.ones_like(a), *rest)
    torch.testing.assert_close((h, last), (expected, expected_last), rtol=0, atol=1e-13)


def test_one_state_a_channel_is_the_linear_scan() -> None:
    inputs = problem("selective_scan", 2, 33, 3)
    inputs |= {name: torch.ones(2, 33, 1).double() for name in ("B", "C")}
    inputs |= {"A": inputs["A"][:, :1], "h0": inputs["h0"][..., :1]}
    y, last = SCANS["selective_scan"](**inputs)
    a = (inputs["dt"] * inputs["A"].squeeze(1)).exp()
    rest = inputs["h0"].squeeze(-1), inputs["starts"]
    expected, expected_last = linear_scan(inputs["dt"] * inputs["x"], a, *rest)
    torch.testing.assert_close((y, last.squeeze(-1)), (expected, expected_last), rtol=0, atol=1e-13)


def test_the_states_of_all_steps_are_never_kept() -> None:
    inputs, kept = problem("selective_scan", 2, 160, 3, starts=False), {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        selective_scan(**{k: x.requires_grad_() for k, x in inputs.items()})
    given = sum(x.numel() for x in inputs.values())
    assert sum(kept.values()) - given == 2 * 3 * 4 * (160 // 5 - 1)


@each_scan
def test_shapes_that_do_not_fit_are_named(op: str) -> None:
    inputs = problem(op, 2, 7, 5) | {"mask": torch.ones(2, 7, dtype=torch.bool)}
    for name in set(inputs) - {"x", "u"}:
        with pytest.raises(PHAError, match=f"{op}: {name} is "):
            SCANS[op](**(inputs | {name: inputs[name][:1]}))


@each_scan
def test_as_an_operator_of_torch(op: str) -> None:
    inputs = problem(op, 2, 7, 3)
    leaves = [v if k == "starts" else v.float().requires_grad_() for k, v in inputs.items()]
    torch.library.opcheck(getattr(torch.ops.pha, op).default, tuple(leaves))


def test_no_steps_leave_the_state() -> None:
    u, h0 = torch.zeros(2, 0, 3), torch.ones(2, 3)
    h, last = linear_scan(u, u, h0)
    assert h.shape == u.shape
    assert last is not None
    assert torch.equal(last, h0)
