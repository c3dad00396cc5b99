"""Mamba-2 written out, its size, its options and how it starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.mixers import Mamba2
from pha.model import ArchitectureConfig, Backbone
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import linear_attention
from pha.utils.errors import PHAError
from tests.mixers.common import assert_uniform, check_equations, convolved, rms, silu, softplus
from tests.model.common import plain_context, small


def literal(layer: Mamba2, z_Td: Tensor) -> list[Tensor]:
    S, inputs, outputs = torch.zeros(6, 10, 8, dtype=z_Td.dtype), [], []
    for z_t in z_Td:
        gate, xBC, dt = (layer.W_in.weight @ z_t).split([48, 68, 6])
        inputs.append(xBC)
        x, B, C = silu(convolved(inputs, layer.conv_weight) + layer.conv_bias).split([48, 10, 10])
        x, dt = x.view(6, 8), softplus(dt + layer.dt_bias)
        decay = (-layer.A_log.exp() * dt).exp()
        S = decay[:, None, None] * S + B[:, None] * (dt[:, None] * x)[:, None, :]
        y = (C[:, None] * S).sum(1) + layer.D[:, None] * x
        outputs.append(layer.W_o.weight @ rms(y.flatten() * silu(gate), layer.norm.weight))
    return outputs


def test_values_and_gradients_equal_the_equations() -> None:
    check_equations(Mamba2(small(), 0, state_size=10, head_size=8), literal)


def test_defaults_are_those_of_the_source() -> None:
    layer = Mamba2(ArchitectureConfig(hidden_size=768), 0)
    assert layer.W_in.weight.shape == (2 * 1536 + 2 * 128 + 24, 768)
    assert layer.conv_weight.shape == (1536 + 2 * 128, 1, 4)
    assert sum(p.numel() for p in layer.parameters()) == pytest.approx(6.383 * 768**2, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("state_size", 0), ("head_size", 2.5), ("head_size", 7), ("expansion", True)],
)
def test_bad_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(PHAError, match=f"model: {name} of branch mamba2"):
        Backbone(small(branches=["mamba2"], branch_options={"mamba2": {name: value}}))


@pytest.mark.parametrize("ffn", [2.0, 0.0])
def test_it_starts_as_its_source_does_in_the_language_model_too(ffn: float) -> None:
    config = PHAConfig(
        vocab_size=37,
        hidden_size=128,
        num_hidden_layers=3,
        branches=["mamba2"],
        branch_options={"mamba2": {"head_size": 1}},
        primary_ffn_expansion=ffn,
        residual="post",
        deepnorm_init=True,
    )
    layer: Any = PHAForCausalLM(config).model.get_submodule("layers.0.branches.mamba2")
    assert_uniform(layer.A_log.exp(), 1, 16)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert_uniform(dt.log(), math.log(1e-3), math.log(1e-1))
    assert torch.equal(layer.D, torch.ones(256))
    assert torch.equal(layer.norm.weight, torch.ones(256))
    for x in (layer.conv_weight, layer.conv_bias):
        assert_uniform(x, -0.5, 0.5)
    assert_uniform(layer.W_in.weight, -(128**-0.5), 128**-0.5)
    bound = (256 * 3 * (2 if ffn else 1)) ** -0.5
    assert_uniform(layer.W_o.weight, -bound, bound)


def test_with_no_decay_it_is_linear_attention() -> None:
    """Where A is next to nothing and only the newest tap counts."""
    layer = Mamba2(small(), 0, state_size=10, head_size=8).double()
    with torch.no_grad():
        layer.A_log.fill_(-100)
        layer.conv_weight.zero_()[..., -1] = 1
        layer.conv_bias.zero_()
        layer.D.zero_()
    z = torch.randn(2, 70, 24, dtype=torch.float64)
    gate, x, B, C, dt = layer.W_in(z).split([48, 48, 10, 10, 6], -1)
    x, B, C = (torch.nn.functional.silu(part) for part in (x, B, C))
    v = x.unflatten(-1, (6, 8)) * torch.nn.functional.softplus(dt + layer.dt_bias)[..., None]
    y, _ = linear_attention(C.unsqueeze(2), B.unsqueeze(2), v)
    expected = layer.W_o(layer.norm(y.flatten(2) * torch.nn.functional.silu(gate)))
    found = layer(z, plain_context(small(), 70))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_diagnostics_are_the_decays_of_its_tokens() -> None:
    layer = Mamba2(small(), 0, state_size=10, head_size=8)
    z = torch.randn(2, 5, 24)
    dt = layer.W_in(z)[..., -6:] + layer.dt_bias
    expected = (-layer.A_log.exp() * torch.nn.functional.softplus(dt)).exp()
    torch.testing.assert_close(layer.diagnostics(z).decays, expected)
