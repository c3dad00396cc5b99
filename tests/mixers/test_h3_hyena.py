"""H3 and Hyena written out, their sizes, options and starts, and what makes them one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.mixers import H3, Hyena
from pha.model import ArchitectureConfig, Backbone
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import diagonal_ssm
from pha.utils.errors import PHAError
from tests.mixers.common import assert_uniform, check_equations, convolved
from tests.model.common import States, plain_context, scramble, small


def literal_h3(layer: H3, z_Td: Tensor) -> list[Tensor]:
    B, C = layer.shift_B, layer.shift_C[:, 0]
    F = [sum(B[:, n] * C[:, n + lag] for n in range(64 - lag)) for lag in range(64)]
    half = layer.log_dt.exp()[:, None] / 2 * torch.complex(-layer.log_A_re.exp(), layer.A_im)
    a = (1 + half) / (1 - half)
    b = layer.log_dt.exp()[:, None] * torch.view_as_complex(layer.B) / (1 - half)
    ks: list[Tensor] = []
    h, outputs = torch.zeros_like(a), []
    for z_t in z_Td:
        q, k, v = (m.weight @ z_t + m.bias for m in (layer.W_q, layer.W_k, layer.W_v))
        ks.insert(0, k)
        x = (sum(f * k for f, k in zip(F, ks, strict=False)) + layer.D_k * k) * v
        h = a * h + b * x[:, None]
        y = 2 * (torch.view_as_complex(layer.C) * h).sum(1).real + layer.D * x
        outputs.append(layer.W_o.weight @ (q * y) + layer.W_o.bias)
    return outputs


def literal_hyena(layer: Hyena, z_Td: Tensor) -> list[Tensor]:
    d, R, M = z_Td.shape[1], layer.order, layer.max_length
    filters = []
    for step in range(M):
        features = [step / (M - 1)]
        for part in (math.cos, lambda angle: -math.sin(angle)):
            for i in range(16):
                features.append(part(2 * math.pi * step / M * (1e-4 + i * (15 - 1e-4) / 15)))
        x = torch.tensor(features, dtype=z_Td.dtype)
        for i, W in enumerate([layer.filter_in, *layer.filter_inner]):
            x = torch.sin(layer.frequency * (W @ x + layer.filter_biases[i]))
        n = len(layer.filter_out)
        low, high = -math.log(0.01) / 1.5, -math.log(0.01) / 0.3
        delta = torch.tensor([low + i * (high - low) / (n - 1) for i in range(n)], dtype=z_Td.dtype)
        filters.append(layer.filter_out @ x * torch.exp(-delta * step / (M - 1)))
    h, s = torch.stack(filters).view(M, d, R - 1), layer.skip.view(d, R - 1)
    inputs: list[Tensor] = []
    histories: list[list[Tensor]] = [[] for _ in range(R - 1)]
    outputs = []
    for z_t in z_Td:
        inputs.append(layer.W_in.weight @ z_t + layer.W_in.bias)
        *gates, v = (convolved(inputs, layer.conv_weight) + layer.conv_bias).split(d)
        for i in range(R - 1):
            histories[i].insert(0, gates[R - 1 - i] * v)
            y = s[:, i] * histories[i][0]
            v = y + sum(h[lag, :, i] * x for lag, x in enumerate(histories[i][:M]))
        outputs.append(layer.W_o.weight @ (gates[0] * v) + layer.W_o.bias)
    return outputs


def test_h3_equals_its_equations() -> None:
    check_equations(H3(small(), 0, modes=5), literal_h3, T=70)


@pytest.mark.parametrize(("order", "max_length"), [(2, 40), (3, 7), (4, 13)])
def test_hyena_equals_its_equations(order: int, max_length: int) -> None:
    layer = Hyena(small(), 0, order=order, max_length=max_length, filter_size=6)
    torch.nn.init.ones_(layer.frequency)  # at 14 every sine has that many times the rounding
    check_equations(layer, literal_hyena)


def test_shift_by_one_and_a_sum_over_time() -> None:
    layer = H3(small(), 0, modes=1).double()
    with torch.no_grad():
        layer.shift_C.zero_()[:, 0, 1] = 1  # F = delta_1
        for zero in (layer.A_im, layer.log_dt, layer.D, layer.D_k):
            zero.zero_()
        layer.log_A_re.fill_(-torch.inf)
        layer.C.copy_(torch.tensor([0.5, 0.0]))
    z = torch.randn(2, 21, 24, dtype=torch.float64)
    q, k, v = layer.W_q(z), layer.W_k(z), layer.W_v(z)
    before = torch.cat([torch.zeros_like(k[:, :1]), k[:, :-1]], 1)
    expected = layer.W_o(q * (before * v).cumsum(1))
    actual = layer(z, plain_context(small(), 21))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_hyena_of_order_two_with_filters_of_state_spaces_is_h3_without_d(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h3 = scramble(H3(small(), 0, modes=3)).double()
    hyena = scramble(Hyena(small(), 0, max_length=40, filter_size=4)).double()
    with torch.no_grad():
        for zero in (h3.D, h3.shift_C, hyena.conv_weight, hyena.conv_bias):
            zero.zero_()
        h3.shift_B.zero_()[:, 0] = 1
        h3.shift_C[:, 0, 1:3] = torch.randn(24, 2).double()  # three taps, as Hyena has
        # Hyena's x_0, x_1 and v are H3's q, k and v.
        hyena.conv_weight[:, 0, 2] = 1
        taps = torch.cat([h3.shift_C[:, 0, 1:3].flip(1), h3.D_k[:, None]], 1)
        hyena.conv_weight[24:48, 0] = taps
        layers = (h3.W_q, h3.W_k, h3.W_v)
        hyena.W_in.weight.copy_(torch.cat([m.weight for m in layers]))
        hyena.W_in.bias.copy_(torch.cat([m.bias for m in layers]))
        hyena.W_o.load_state_dict(h3.W_o.state_dict())
        Lambda, b = h3._discrete()
        w = torch.view_as_complex(h3.C) * b
        impulse = torch.zeros(1, 40, 24).double()
        impulse[:, 0] = 1
        kernel = diagonal_ssm(impulse, Lambda.real, Lambda.imag, w.real, w.imag, h3.D)[0][0]
    monkeypatch.setattr(hyena, "kernels", lambda: [kernel])
    z, context = torch.randn(2, 33, 24, dtype=torch.float64), plain_context(small(), 33)
    torch.testing.assert_close(hyena(z, context), h3(z, context), rtol=0, atol=1e-11)


def test_sizes_are_those_of_the_sources() -> None:
    d, config = 768, ArchitectureConfig(hidden_size=768)
    h3, *hyenas = (
        sum(p.numel() for p in layer.parameters())
        for layer in (H3(config, 0), Hyena(config, 0), Hyena(config, 0, order=3))
    )
    assert h3 == 4 * d * d + d * (4 + 2 * 64 + 1 + 3 * 64 + 2)
    assert h3 == pytest.approx(2.610e6, rel=1e-3)
    network = 33 * 64 + 2 * 64 * 64 + 4 * 64
    for R, size in zip((2, 3), hyenas, strict=True):
        channels = (R + 1) * d * (1 + 3 + 1) + (R - 1) * d * (64 + 1) + d
        assert size == (R + 2) * d * d + channels + network
        assert size == pytest.approx({2: 4.12, 3: 5.21}[R] * d * d, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *(("h3", "modes", 0), ("h3", "modes", 1.5)),
        *(("hyena", "order", 1), ("hyena", "max_length", 1), ("hyena", "filter_size", True)),
    ],
)
def test_bad_options_are_refused_by_name(name: str, option: str, value: Any) -> None:
    config = small(branches=[name], branch_options={name: {option: value}})
    with pytest.raises(PHAError, match=f"model: {option} of branch {name}"):
        Backbone(config)


def started(name: str) -> Any:
    config = PHAConfig(
        vocab_size=37,
        hidden_size=800,
        num_hidden_layers=1,
        branches=[name],
        primary_ffn_expansion=0,
    )
    return PHAForCausalLM(config).model.get_submodule(f"layers.0.branches.{name}")


def is_normal(x: Tensor, spread: float) -> bool:
    """Within five standard errors of the mean and of the standard deviation."""
    x = x.detach().double().flatten()
    room = 5 / x.numel() ** 0.5
    return bool(abs(x.mean()) <= room * spread and abs(x.std() / spread - 1) <= room)


def test_how_h3_starts_in_the_language_model() -> None:
    layer = started("h3")
    assert_uniform(layer.log_dt, math.log(1e-3), math.log(1e-1))
    A = torch.complex(-layer.log_A_re.exp(), layer.A_im)
    expected = torch.complex(torch.tensor(-0.5), math.pi * torch.arange(32.0))
    torch.testing.assert_close(A, expected.expand(800, 32))
    assert torch.equal(torch.view_as_complex(layer.B), torch.ones(800, 32) + 0j)
    assert torch.equal(layer.shift_B, torch.eye(64)[0].expand(800, 64))
    assert_uniform(layer.shift_C, -1 / 8, 1 / 8)
    assert is_normal(layer.C, 0.5**0.5)
    assert is_normal(layer.D, 1)
    assert is_normal(layer.D_k, 1)
    for m in (layer.W_q, layer.W_k, layer.W_v, layer.W_o):
        assert is_normal(m.weight, 0.02)
        assert not m.bias.any()


def test_how_hyena_starts_in_the_language_model() -> None:
    layer = started("hyena")
    assert bool((layer.frequency == 14).all())
    matrices = (layer.filter_in, layer.filter_inner, layer.filter_out)
    assert all(is_normal(W, 0.02) for W in (*matrices, layer.W_in.weight, layer.W_o.weight))
    assert not any(b.any() for b in (layer.filter_biases, layer.W_in.bias, layer.W_o.bias))
    assert is_normal(layer.skip, 1)
    for x in (layer.conv_weight, layer.conv_bias):
        assert_uniform(x, -(3**-0.5), 3**-0.5)


def test_what_they_keep() -> None:
    for layer, shapes in (
        (H3(small(), 0, modes=5), {(2, 24, 5, 2), (2, 63, 24)}),
        (Hyena(small(), 0, order=3, max_length=9), {(2, 2, 96), (2, 8, 48)}),
    ):
        cache = States()
        layer(torch.randn(2, 11, 24), plain_context(small(), 11, cache=cache))
        assert {tuple(x.shape) for x in cache.kept.values()} == shapes


def test_beyond_its_longest_length_hyena_has_a_window() -> None:
    layer = scramble(Hyena(small(), 0, max_length=7, filter_size=4)).double()
    z = torch.randn(1, 20, 24, dtype=torch.float64)
    other = torch.cat([torch.randn(1, 6, 24).double(), z[:, 6:]], 1)
    outputs = [layer(x, plain_context(small(), 20)) for x in (z, other)]
    # Six steps of the filter, two more of the short convolution.
    torch.testing.assert_close(outputs[0][:, 14:], outputs[1][:, 14:], rtol=0, atol=1e-12)
    assert not torch.allclose(outputs[0][:, 13], outputs[1][:, 13], rtol=0, atol=1e-9)


def test_h3s_diagnostics_are_its_decays() -> None:
    layer = H3(small(), 0, modes=5)
    half = layer.log_dt.exp()[:, None] / 2 * torch.complex(-layer.log_A_re.exp(), layer.A_im)
    found = layer.diagnostics(torch.randn(2, 5, 24)).decays
    torch.testing.assert_close(found, ((1 + half) / (1 - half)).abs())
