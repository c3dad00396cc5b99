"""The attention branch against scaled-cosine attention written out."""

from __future__ import annotations

import cmath
import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn

from pha.model import ArchitectureConfig, GroupedQueryAttention
from pha.model.attention import rotary_angles
from pha.ops import rotate
from tests.model.common import plain_context, scramble, small

EPS32 = torch.finfo(torch.float32).eps


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of one vector by complex multiplication: x_i + i x_(i + K/2)."""
    half = x.numel() // 2
    y = x.clone()
    for i in range(half):
        phase = cmath.exp(1j * position * theta ** (-2 * i / x.numel()))
        z = complex(x[i], x[i + half]) * phase
        y[i], y[i + half] = z.real, z.imag
    return y


def literal(attention: GroupedQueryAttention, config: ArchitectureConfig, z: Tensor) -> Tensor:
    """softmax over cosine times temperature, one query head and token at a time, in float64."""
    H, G, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    W_q, W_k, W_v, W_o = (
        m.weight.detach() for m in (attention.W_q, attention.W_k, attention.W_v, attention.W_o)
    )
    scales = attention.logit_scale.tolist() if attention.cosine else []
    y = torch.zeros_like(z)
    for b, z_Td in enumerate(z):
        for t in range(z.shape[1]):
            heads = []
            for h in range(H):
                g = h // (H // G)
                q = (W_q @ z_Td[t])[h * K : (h + 1) * K]
                logits, values = [], []
                for s in range(t + 1):
                    k = (W_k @ z_Td[s])[g * K : (g + 1) * K]
                    product = float(
                        turned(q, t, config.rope_theta) @ turned(k, s, config.rope_theta)
                    )
                    if config.attention_logits == "scaled-cosine":
                        temperature = min(math.exp(scales[h]), 100.0)
                        logits.append(temperature * product / float(q.norm() * k.norm()))
                    else:
                        logits.append(product / math.sqrt(K))
                    values.append((W_v @ z_Td[s])[g * K : (g + 1) * K])
                weights = torch.tensor(logits, dtype=z.dtype).softmax(0)
                heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            y[b, t] = W_o @ torch.cat(heads)
    return y


def make_attention(**overrides: Any) -> tuple[GroupedQueryAttention, ArchitectureConfig]:
    torch.manual_seed(0)
    config = small(**overrides)
    return scramble(GroupedQueryAttention(config, 0)), config


@pytest.mark.parametrize("logits", ["scaled-cosine", "dot-product"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (3, 3)])
def test_equals_the_formula(logits: str, heads: int, kv_heads: int) -> None:
    attention, config = make_attention(
        attention_logits=logits, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    attention = attention.double()
    z = torch.randn(2, 6, 24, dtype=torch.float64)
    y = attention(z, plain_context(config, 6))
    # Queries, keys and angles are float32: a logit of about 10 is off by a few units of it.
    atol = 30 * EPS32 * y.abs().max().item()
    torch.testing.assert_close(y, literal(attention, config, z), rtol=0, atol=atol)


def test_temperature_starts_at_ten_and_is_clamped_at_a_hundred() -> None:
    attention, config = make_attention()
    assert torch.equal(
        GroupedQueryAttention(config, 0).logit_scale.detach(), torch.full((6,), math.log(10.0))
    )
    z = torch.randn(1, 9, 24)

    def output(scale: float) -> Tensor:
        with torch.no_grad():
            attention.logit_scale.fill_(scale)
        return attention(z, plain_context(config, 9))

    limit = output(math.log(100.0))
    assert torch.equal(output(math.log(100.0) + 3), limit)
    assert not torch.equal(output(math.log(99.0)), limit)
    output(math.log(100.0) + 3).square().sum().backward()
    assert attention.logit_scale.grad is not None
    assert torch.equal(attention.logit_scale.grad, torch.zeros(6))


def test_temperature_is_one_of_each_head() -> None:
    attention, config = make_attention()
    # With the identity as output projection the heads can be told apart.
    attention.W_o = nn.Identity()  # type: ignore[assignment]
    z = torch.randn(1, 9, 24)
    before = attention(z, plain_context(config, 9)).view(1, 9, 6, 10)
    with torch.no_grad():
        attention.logit_scale[4] -= 1.0
    after = attention(z, plain_context(config, 9)).view(1, 9, 6, 10)
    moved = (after - before).abs().amax((0, 1, 3)) > 0
    assert moved.tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("factor", [0.01, 7.0])
@pytest.mark.parametrize("which", ["W_q", "W_k"])
def test_logits_are_cosines(which: str, factor: float) -> None:
    for logits in ("scaled-cosine", "dot-product"):
        attention, config = make_attention(attention_logits=logits)
        z = torch.randn(1, 9, 24)
        before = attention(z, plain_context(config, 9))
        with torch.no_grad():
            getattr(attention, which).weight.mul_(factor)
        difference = (attention(z, plain_context(config, 9)) - before).abs().max().item()
        if logits == "scaled-cosine":
            assert difference <= 30 * EPS32 * before.abs().max().item()
        else:
            assert difference > 0.01 * before.abs().max().item()


def test_normalisation_survives_a_zero_vector() -> None:
    attention, config = make_attention()
    z = torch.zeros(1, 5, 24, requires_grad=True)
    attention(z, plain_context(config, 5)).sum().backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


@pytest.mark.parametrize("shift", [1, 17, 4096, 10**6, 2**31])
def test_shifting_all_positions_changes_nothing(shift: int) -> None:
    attention, config = make_attention()
    z = torch.randn(2, 9, 24)
    positions = torch.arange(9).expand(2, 9).clone()
    y = attention(z, plain_context(config, 9, positions))
    shifted = attention(z, plain_context(config, 9, positions + shift))
    # Angles are float64, and those of 2^31 tokens good to ten units of float32.
    limit = (30 + 100 * (shift > 10**6)) * EPS32 * y.abs().max().item()
    assert (shifted - y).abs().max().item() <= limit
    # The control: moving half of them does change the result, in that row only.
    positions[1, 5:] += 1
    moved = attention(z, plain_context(config, 9, positions))
    assert torch.equal(moved[0], y[0])
    assert (moved[1] - y[1]).abs().max().item() > 100 * limit


@pytest.mark.parametrize("head_dim", [2, 10, 60, 76])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rotation_is_the_complex_one(head_dim: int, theta: float) -> None:
    positions = torch.tensor([[0, 1, 5, 63]])
    x = torch.randn(1, 1, 4, head_dim, dtype=torch.float64)
    y = rotate(x, *rotary_angles(positions, head_dim, theta))
    for i, p in enumerate(positions[0].tolist()):
        expected = turned(x[0, 0, i], p, theta)
        # Cosines and sines are float32.
        torch.testing.assert_close(y[0, 0, i], expected, rtol=0, atol=8 * EPS32)
    assert torch.equal(y[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("place", [0, 10**3, 10**6, 10**7, 2**31])
@pytest.mark.parametrize("theta", [500.0, 1e4, 1.28e8])
def test_angles_are_exact_however_far(place: int, theta: float) -> None:
    cos, sin = rotary_angles(torch.tensor([place]), 24, theta)
    with mpmath.workdps(50):
        angles = [place * mpmath.mpf(theta) ** (mpmath.mpf(-2 * i) / 24) for i in range(12)]
        exact = torch.tensor([[float(f(x)) for x in angles] for f in (mpmath.cos, mpmath.sin)])
    torch.testing.assert_close(torch.cat([cos, sin]), exact, rtol=0, atol=1e-6)


def test_bfloat16_computes_cosines_in_float32() -> None:
    attention, config = make_attention()
    z = torch.randn(2, 9, 24)
    y = attention(z, plain_context(config, 9))
    with torch.autocast("cpu", torch.bfloat16):
        z_cast = z.bfloat16()
        rough = attention(z_cast, plain_context(config, 9))
    assert rough.dtype == torch.bfloat16
    # Four roundings to bfloat16 (z, the projection, the rotated vector, the weights), with logits
    # of 10: around 10 * 2^-8 of the largest output.
    assert ((rough - y).abs().max() / y.abs().max()).item() <= 12 * 2**-8


def test_dot_product_has_no_temperature() -> None:
    attention, _ = make_attention(attention_logits="dot-product")
    assert [name for name, _ in attention.named_parameters()] == [
        "W_q.weight",
        "W_k.weight",
        "W_v.weight",
        "W_o.weight",
    ]
