"""The gated state space branch against Eq. 2 written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.model import GatedStateSpace
from tests.model.common import States, plain_context, scramble, small

EPS32 = torch.finfo(torch.float32).eps
each_input_scaling = pytest.mark.parametrize("input_scaling", ["unit-variance", "zero-order-hold"])


def literal_decay_and_scale(gss: GatedStateSpace) -> tuple[Tensor, Tensor]:
    """a and b by their definitions, in float64, one state at a time."""
    a, b = [], []
    log_dt = gss.log_dt.tolist()
    for k, log_A in enumerate(gss.log_A.tolist()):
        A, dt = -math.exp(log_A), math.exp(log_dt[k // 16])
        a.append(math.exp(dt * A))
        if gss.input_scaling == "unit-variance":
            b.append(math.sqrt(-math.expm1(2 * dt * A)))
        else:
            b.append(-math.expm1(dt * A))
    return torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)


def literal_forward(gss: GatedStateSpace, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Eq. 2, one sequence and one time step after the other."""
    W_g, W_B, W_C = (m.weight for m in (gss.W_g, gss.W_B, gss.W_C))
    sequences = []
    for z_Td in z:
        h = torch.zeros(W_g.shape[0], dtype=z.dtype)
        outputs = []
        for z_t in z_Td:
            u_t = (1 / (1 + torch.exp(-(W_g @ z_t)))) * (W_B @ z_t)
            h = a * h + b * u_t
            outputs.append(W_C @ h)
        sequences.append(torch.stack(outputs))
    return torch.stack(sequences)


def make_gss(**overrides: Any) -> GatedStateSpace:
    torch.manual_seed(0)
    return scramble(GatedStateSpace(small(**overrides), 0))


@each_input_scaling
def test_equals_the_equation(input_scaling: str) -> None:
    gss = make_gss(input_scaling=input_scaling).double()
    z = torch.randn(2, 13, 24, dtype=torch.float64)
    y = gss(z, plain_context(small(), 13))
    # a and b are float32 by contract, here as the module gives them; all else is float64.
    a, b = (x.double() for x in gss.decay_and_scale())
    torch.testing.assert_close(y, literal_forward(gss, z, a, b), rtol=0, atol=1e-13)


@each_input_scaling
def test_gradients_equal_those_of_the_equation(input_scaling: str) -> None:
    gss = make_gss(input_scaling=input_scaling).double()
    z = torch.randn(2, 9, 24, dtype=torch.float64)
    weight = torch.randn(2, 9, 24, dtype=torch.float64)
    parameters = dict(gss.named_parameters())
    assert set(parameters) == {"W_g.weight", "W_B.weight", "W_C.weight", "log_A", "log_dt"}
    y = gss(z, plain_context(small(), 9))
    actual = torch.autograd.grad((y * weight).sum(), list(parameters.values()))
    dt_A = -gss.log_dt.exp().repeat_interleave(16) * gss.log_A.exp()
    a = dt_A.exp()
    b = (1 - a * a).sqrt() if input_scaling == "unit-variance" else 1 - a
    y = literal_forward(gss, z, a, b)
    expected = torch.autograd.grad((y * weight).sum(), list(parameters.values()))
    for name, x, e in zip(parameters, actual, expected, strict=True):
        # Only the float32 of a and b, a few units, separates the two.
        assert ((x - e).abs().max() / e.abs().max()).item() <= 10 * EPS32, name


@each_input_scaling
def test_decays_and_input_scale_by_definition(input_scaling: str) -> None:
    gss = make_gss(input_scaling=input_scaling, state_size=16 * 64)
    a, b = gss.decay_and_scale()
    assert a.dtype == b.dtype == torch.float32
    a_exact, b_exact = literal_decay_and_scale(gss)
    assert (a - a_exact).abs().max().item() <= 2 * EPS32
    # b is small where a is near one, and stays relatively exact there: 1 - a would not.
    assert (b / b_exact - 1).abs().max().item() <= 8 * EPS32
    assert a_exact.max().item() > 0.999
    assert a.min().item() > 0
    assert a.max().item() < 1


def test_initial_A_is_the_hippo_diagonal() -> None:
    gss = GatedStateSpace(small(state_size=80), 0)
    expected = -torch.arange(1.0, 17.0).repeat(5)
    # The logarithm is rounded once: relative error up to ln(16) half units.
    torch.testing.assert_close(-gss.log_A.exp(), expected, rtol=3 * EPS32, atol=0)


@pytest.mark.parametrize(("dt_min", "dt_max"), [(1e-3, 1e-1), (1e-4, 0.5)])
def test_initial_time_steps_are_log_uniform(dt_min: float, dt_max: float) -> None:
    torch.manual_seed(0)
    groups = 4096
    gss = GatedStateSpace(small(state_size=16 * groups, dt_min=dt_min, dt_max=dt_max), 0)
    log_dt = gss.log_dt.detach().double().sort().values
    low, high = math.log(dt_min), math.log(dt_max)
    assert float(log_dt[0]) >= low - 1e-6
    assert float(log_dt[-1]) <= high + 1e-6
    # Kolmogorov-Smirnov: a uniform sample strays further than 1.95 / sqrt(N) once in 1000 seeds.
    ranks = (torch.arange(groups, dtype=torch.float64) + 0.5) / groups
    assert float(((log_dt - low) / (high - low) - ranks).abs().max()) <= 1.95 / groups**0.5


def test_time_step_is_shared_by_a_group_of_sixteen() -> None:
    gss = make_gss(state_size=48)
    before, _ = gss.decay_and_scale()
    with torch.no_grad():
        gss.log_dt[1] += 1.0
    changed = (gss.decay_and_scale()[0] != before).nonzero().flatten()
    assert changed.tolist() == list(range(16, 32))


@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_decays_are_float32_beside_bfloat16(how: str, spy: Callable[[str], dict[str, Any]]) -> None:
    gss, z = make_gss(), torch.randn(2, 5, 24)
    if how == "cast":
        gss, z = gss.bfloat16(), z.bfloat16()
    exact, _ = gss.decay_and_scale()
    seen = spy("pha.model.gss.gated_scan")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        a, b = gss.decay_and_scale()
        y = gss(z, plain_context(small(), 5, cache=States()))
    assert torch.equal(a, exact)
    assert b.dtype == torch.float32
    gate, value, decay, *_ = seen["inputs"]
    assert gate.dtype == value.dtype == y.dtype == torch.bfloat16
    assert decay.dtype == seen["outputs"][1].dtype == torch.float32
    # The logarithms are rounded when cast; what is computed from them is not rounded again.
    assert (a - literal_decay_and_scale(gss)[0]).abs().max().item() <= 2 * EPS32


def test_state_is_carried_through_the_cache() -> None:
    gss = make_gss().double()
    z = torch.randn(2, 11, 24, dtype=torch.float64)
    whole = gss(z, plain_context(small(), 11))
    cache = States()
    pieces = [
        gss(piece, plain_context(small(), piece.shape[1], cache=cache))
        for piece in z.split([4, 1, 6], 1)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-14)


def test_padding_puts_nothing_into_the_state() -> None:
    gss = make_gss().double()
    z = torch.randn(1, 9, 24, dtype=torch.float64)
    tokens = torch.arange(9)[None] >= 4
    padded = gss(z, plain_context(small(), 9, token_mask=tokens))
    alone = gss(z[:, 4:], plain_context(small(), 5))
    torch.testing.assert_close(padded[:, 4:], alone, rtol=0, atol=1e-14)
    assert torch.equal(padded[:, :4], torch.zeros_like(padded[:, :4]))


def test_the_branch_goes_into_one_graph() -> None:
    gss = make_gss()
    z = torch.randn(2, 9, 24)
    context = plain_context(small(), 9)
    compiled = torch.compile(gss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (gss, compiled):
        y = function(z, context)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(gss.parameters()))])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
