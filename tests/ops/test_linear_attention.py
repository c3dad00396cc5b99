"""Linear attention in chunks against the recurrence, values and all gradients; and identities."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops import OPS, linear_attention
from pha.utils.errors import PHAError
from tests.ops.common import (
    Function,
    Inputs,
    converted,
    cpu_backends,
    errors,
    gradcheck,
    in_pieces,
    is_rounded_once,
    outcome,
    starts_of,
    worst,
)

BACKENDS = cpu_backends("linear_attention")
FORMS = [(decay, rule) for decay in ("none", "head", "channel") for rule in ("sum", "delta")]
LENGTHS = [1, 2, 3, 63, 64, 65, 150]
EPS32 = torch.finfo(torch.float32).eps
OVER_TIME = ("q", "k", "v", "g", "beta", "starts")

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize(("decay", "rule"), FORMS)
chunked = OPS["linear_attention"].backends["chunked"]


def backend_function(name: str) -> Function:
    return OPS["linear_attention"].backends[name]


def problem(
    T: int,
    decay: str = "head",
    rule: str = "sum",
    flags: bool = False,
    B: int = 2,
    shared: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Inputs by name: keys of unit length, decays from nearly none to a whole memory at once."""
    H, K, P = 4, 7, 5
    generator = torch.Generator().manual_seed(100 * T + 10 * len(decay) + len(rule))
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(state)

    inputs: Inputs = {
        "q": normal(B, T, H // shared, K).to(dtype),
        "k": F.normalize(normal(B, T, H // shared, K), dim=-1).to(dtype),
        "v": normal(B, T, H, P).to(dtype),
        "h0": normal(B, H, K, P),
    }
    if decay != "none":
        shape = (B, T, H) if decay == "head" else (B, T, H, K)
        inputs["g"] = F.logsigmoid(4 * normal(*shape) + 2)
    if rule == "delta":
        inputs["beta"] = normal(B, T, H).sigmoid()
    if flags:
        inputs["starts"] = torch.rand(B, T, generator=generator) < 0.1
    return inputs


@functools.cache
def oracle(*case: Any) -> dict[str, Tensor]:
    return outcome(backend_function("naive"), converted(problem(*case), torch.float64))


@each_form
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("flags", [False, True])
def test_matches_the_recurrence(decay: str, rule: str, T: int, flags: bool) -> None:
    case = T, decay, rule, flags
    assert worst(outcome(chunked, problem(*case)), oracle(*case)) <= 1e-13
    single = outcome(chunked, converted(problem(*case), torch.float32))
    # Sums of T terms of both signs.
    assert max(errors(single, oracle(*case)).values()) <= EPS32 * (8 + T / 4)


@each_backend
@each_form
def test_equals_the_sum_over_pairs(backend: str, decay: str, rule: str) -> None:
    """The equation unrolled, with additions u that the delta rule solves for one by one."""
    inputs = problem(9, decay, rule, shared=1)
    q, k, v, h0 = (inputs[name] for name in ("q", "k", "v", "h0"))
    g = inputs.get("g", torch.zeros(()).expand(2, 9, 4))
    decays = (g if g.dim() == 4 else g[..., None]).exp().expand(k.shape)
    expected = torch.zeros_like(v)
    for b in range(2):
        for h in range(4):
            u: list[Tensor] = []

            def read(x: Tensor, t: int, b: int = b, h: int = h, u: list[Tensor] = u) -> Tensor:
                """What the state, decayed to t, has for x."""
                found = (x * decays[b, : t + 1, h].prod(0)) @ h0[b, h]
                for s, u_s in enumerate(u):
                    found = found + x @ (decays[b, s + 1 : t + 1, h].prod(0) * k[b, s, h]) * u_s
                return found

            for t in range(9):
                beta = inputs["beta"][b, t, h] if rule == "delta" else 1
                u.append(beta * (v[b, t, h] - (read(k[b, t, h], t) if rule == "delta" else 0)))
                expected[b, t, h] = read(q[b, t, h], t)
    torch.testing.assert_close(backend_function(backend)(**inputs)[0], expected, rtol=0, atol=1e-13)


@each_form
def test_gradcheck(decay: str, rule: str) -> None:
    gradcheck(chunked, problem(5, decay, rule, flags=True, B=1))


@each_form
@pytest.mark.parametrize("lengths", [[1, 149], [70, 64, 16], [20] * 7 + [10]])
def test_pieces_with_carried_state_equal_the_whole(
    decay: str, rule: str, lengths: list[int]
) -> None:
    inputs = problem(150, decay, rule, flags=True)
    carried = in_pieces(linear_attention, lengths, OVER_TIME)
    assert worst(outcome(carried, inputs), outcome(linear_attention, inputs)) <= 1e-13


@each_form
@pytest.mark.parametrize("lengths", [[5, 1, 1, 67, 76], [150], [64, 86]])
def test_packed_documents_equal_separate_ones(decay: str, rule: str, lengths: list[int]) -> None:
    inputs = problem(150, decay, rule, B=1)
    del inputs["h0"]
    packed = outcome(linear_attention, inputs | {"starts": starts_of(lengths)})
    apart = outcome(in_pieces(linear_attention, lengths, OVER_TIME), inputs)
    assert worst(packed, apart) <= 1e-13


@each_form
def test_a_later_step_never_changes_an_earlier_one(decay: str, rule: str) -> None:
    inputs = problem(150, decay, rule)
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in set(OVER_TIME) & set(changed):
        changed[name][:, 100:] *= 0.5
    y, later = linear_attention(**inputs)[0], linear_attention(**changed)[0]
    assert torch.equal(y[:, :100], later[:, :100])
    assert not torch.equal(y[:, 100:], later[:, 100:])


@each_form
def test_half_precision_is_rounded_once_and_keeps_its_state_in_float32(
    decay: str, rule: str
) -> None:
    inputs = problem(150, decay, rule, True, dtype=torch.bfloat16)
    exact = outcome(backend_function("naive"), converted(inputs, torch.float64))
    types: list[torch.dtype] = []

    def function(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = linear_attention(**inputs)
        types.extend(x.dtype for x in outputs if x is not None)
        return outputs

    actual = outcome(function, inputs)
    assert types == [torch.bfloat16, torch.float32]
    assert all(is_rounded_once(actual[x], exact[x], 1e-6) for x in ("y", "dq", "dk", "dv"))
    assert worst({"last": actual["last"]}, {"last": exact["last"]}) <= 1e-6


@each_backend
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_decays_that_forget_everything_at_once(backend: str, decay: str, rule: str) -> None:
    """Chunks whose decays differ by thousands of powers of e neither overflow nor lose digits."""
    inputs = problem(130, decay, rule)
    strong = torch.rand(130, generator=torch.Generator().manual_seed(0)) < 0.2
    g = torch.where(strong.view(1, -1, *[1] * (inputs["g"].dim() - 2)), -300.0, inputs["g"])
    inputs["g"] = g
    exact = outcome(backend_function("naive"), inputs)
    found = outcome(backend_function(backend), converted(inputs, torch.float32))
    assert max(errors(found, exact).values()) <= EPS32 * (8 + 130 / 4)


@each_backend
def test_without_decay_the_state_is_the_sum_of_all_products(backend: str) -> None:
    inputs = problem(150, "none", shared=1)
    del inputs["h0"]
    S = (inputs["k"].unsqueeze(-1) * inputs["v"].unsqueeze(-2)).cumsum(1)
    y, last = backend_function(backend)(**inputs)
    torch.testing.assert_close(y, (S * inputs["q"].unsqueeze(-1)).sum(-2), rtol=0, atol=1e-12)
    torch.testing.assert_close(last, S[:, -1], rtol=0, atol=1e-12)


@each_backend
@pytest.mark.parametrize("decay", ["none", "head"])
def test_the_delta_rule_overwrites_what_an_orthonormal_key_has(backend: str, decay: str) -> None:
    """Each key's value is the last one written, with what it decayed by since."""
    T, K, P = 90, 6, 3
    keys = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64))[0]
    which = torch.randint(K, (T,))
    k, v = keys[which].view(1, T, 1, K), torch.randn(1, T, 1, P, dtype=torch.float64)
    g = None if decay == "none" else torch.full((1, T, 1), -0.01, dtype=torch.float64)
    beta = torch.ones(1, T, 1, dtype=torch.float64)
    _, last = backend_function(backend)(k, k, v, g, beta)
    for i in range(K):
        written = int((which == i).nonzero().max())
        expected = v[0, written, 0] * (1 if g is None else g[0, written + 1 :].sum().exp())
        torch.testing.assert_close(keys[i] @ last[0, 0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["q", "k", "g", "beta", "h0", "starts", "mask"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    inputs = problem(6, "head", "delta", True) | {"mask": torch.ones(2, 6, dtype=torch.bool)}
    inputs[name] = inputs[name][:1]
    with pytest.raises(PHAError, match=f"linear_attention: {name} is "):
        linear_attention(**inputs)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    inputs = problem(6, "head", shared=1)
    three = {"v": inputs["v"][:, :, :3], "g": inputs["g"][..., :3], "h0": inputs["h0"][:, :3]}
    with pytest.raises(PHAError, match="3 heads of v cannot share 4"):
        linear_attention(**(inputs | three))
