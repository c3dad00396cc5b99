"""S4D written out, its size, its options, how it starts; with real modes it is a scan."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pha.mixers import S4D
from pha.model import ArchitectureConfig, Backbone
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import linear_scan
from pha.utils.errors import PHAError
from tests.mixers.common import assert_uniform, check_equations, sigmoid
from tests.model.common import States, plain_context, scramble, small


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def literal(layer: S4D, z_Td: Tensor) -> list[Tensor]:
    A = torch.complex(-layer.log_A_re.exp(), layer.A_im)
    a = (layer.log_dt.exp()[:, None] * A).exp()
    C, h, outputs = torch.view_as_complex(layer.C), torch.zeros_like(A), []
    for u in z_Td:
        h = a * h + (a - 1) / A * u[:, None]
        y = 2 * (C * h).sum(1).real + layer.D * u
        both = layer.W_o.weight @ gelu(y) + layer.W_o.bias
        outputs.append(both[:24] * sigmoid(both[24:]))
    return outputs


def test_values_and_gradients_equal_the_equations() -> None:
    check_equations(S4D(small(), 0, modes=5), literal)


def test_size_is_that_of_the_source() -> None:
    layer = S4D(ArchitectureConfig(hidden_size=768), 0)
    size = sum(p.numel() for p in layer.parameters())
    assert size == 768 * (2 * 768 + 2 + 2 * 64 + 2)
    assert size == pytest.approx(2.17 * 768**2, rel=1e-3)


@pytest.mark.parametrize("value", [0, 2.5, True])
def test_bad_options_are_refused_by_name(value: Any) -> None:
    with pytest.raises(PHAError, match="model: modes of branch s4d"):
        Backbone(small(branches=["s4d"], branch_options={"s4d": {"modes": value}}))


def test_how_it_starts_in_the_language_model() -> None:
    config = PHAConfig(
        vocab_size=37,
        hidden_size=800,
        num_hidden_layers=1,
        branches=["s4d"],
        primary_ffn_expansion=0,
    )
    layer: Any = PHAForCausalLM(config).model.get_submodule("layers.0.branches.s4d")
    assert_uniform(layer.log_dt, math.log(1e-3), math.log(1e-1))
    A = torch.complex(-layer.log_A_re.exp(), layer.A_im)
    expected = torch.complex(torch.tensor(-0.5), math.pi * torch.arange(32.0))
    torch.testing.assert_close(A, expected.expand(800, 32))
    for values, spread in ((layer.C, 0.5**0.5), (layer.D, 1.0)):
        x = values.detach().double().flatten()
        # Five standard errors of the mean and of the standard deviation.
        assert abs(float(x.mean())) <= 5 * spread / x.numel() ** 0.5
        assert abs(float(x.std()) / spread - 1) <= 5 / (2 * x.numel()) ** 0.5
    assert not layer.W_o.bias.any()


def test_with_real_modes_it_is_a_scan() -> None:
    layer = scramble(S4D(small(), 0, modes=1)).double()
    torch.nn.init.zeros_(layer.A_im)
    torch.nn.init.zeros_(layer.C[..., 1].data)
    z = torch.randn(2, 63, 24, dtype=torch.float64)
    rate = layer.log_A_re[:, 0].exp()
    a = (-rate * layer.log_dt.exp()).exp()
    h, _ = linear_scan((1 - a) / rate * z, a.expand_as(z))
    y = 2 * layer.C[:, 0, 0] * h + layer.D * z
    expected = F.glu(layer.W_o(F.gelu(y)), -1)
    actual = layer(z, plain_context(small(), 63))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_the_convolution_equals_the_recurrence_in_float32() -> None:
    layer, T = S4D(small(), 0), 150  # at its starting values, of slow and fast modes
    z = torch.randn(2, T, 24)
    whole, cache = layer(z, plain_context(small(), T)), States()
    steps = [layer(z_t, plain_context(small(), 1, cache=cache)) for z_t in z.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-4)
    assert cache.kept[0].shape == (2, 24, 32, 2)


def test_diagnostics_are_its_decays() -> None:
    layer = S4D(small(), 0, modes=5)
    expected = (-layer.log_dt.exp()[:, None] * layer.log_A_re.exp()).exp()
    found = layer.diagnostics(torch.randn(2, 5, 24)).decays
    torch.testing.assert_close(found, expected)
