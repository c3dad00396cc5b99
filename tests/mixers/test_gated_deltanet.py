"""Gated DeltaNet written out, its size, its options and how it starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.mixers import GatedDeltaNet
from pha.model import ArchitectureConfig, Backbone
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.utils.errors import PHAError
from tests.mixers.common import (
    assert_uniform,
    check_equations,
    convolved,
    rms,
    sigmoid,
    silu,
    softplus,
)
from tests.model.common import small

SHAPE = {"heads": 3, "key_size": 6, "value_size": 10}


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum() + 1e-6).sqrt()


def literal(layer: GatedDeltaNet, z_Td: Tensor) -> list[Tensor]:
    states = [torch.zeros(6, 10, dtype=z_Td.dtype) for _ in range(3)]
    inputs, outputs = [], []
    for z_t in z_Td:
        inputs.append(torch.cat([m.weight @ z_t for m in (layer.W_q, layer.W_k, layer.W_v)]))
        q, k, v = silu(convolved(inputs, layer.conv_weight)).split([18, 18, 30])
        decay = (-layer.A_log.exp() * softplus(layer.W_a.weight @ z_t + layer.dt_bias)).exp()
        beta, gate = sigmoid(layer.W_b.weight @ z_t), silu(layer.W_g.weight @ z_t)
        heads = []
        for h in range(3):
            q_h, k_h = (unit(x.view(3, 6)[h]) for x in (q, k))
            S = decay[h] * states[h]
            states[h] = S + beta[h] * torch.outer(k_h, v.view(3, 10)[h] - S.T @ k_h)
            heads.append(rms(states[h].T @ q_h / math.sqrt(6), layer.norm.weight))
        outputs.append(layer.W_o.weight @ (torch.cat(heads) * gate))
    return outputs


def test_values_and_gradients_equal_the_equations() -> None:
    check_equations(GatedDeltaNet(small(), 0, **SHAPE), literal)


def test_defaults_are_six_square_matrices_at_width_768() -> None:
    layer = GatedDeltaNet(ArchitectureConfig(hidden_size=768), 0)
    assert layer.W_q.weight.shape == layer.W_k.weight.shape == (576, 768)
    assert layer.W_v.weight.shape == layer.W_g.weight.shape == (1152, 768)
    assert sum(p.numel() for p in layer.parameters()) == pytest.approx(6.032 * 768**2, rel=1e-4)


@pytest.mark.parametrize("name", ["heads", "key_size", "value_size"])
@pytest.mark.parametrize("value", [0, 2.5, True])
def test_bad_options_are_refused_by_name(name: str, value: Any) -> None:
    options = {"gated_deltanet": {name: value}}
    with pytest.raises(PHAError, match=f"model: {name} of branch gated_deltanet"):
        Backbone(small(branches=["gated_deltanet"], branch_options=options))


def test_how_it_starts_in_the_language_model() -> None:
    config = PHAConfig(
        vocab_size=37,
        hidden_size=64,
        num_hidden_layers=1,
        branches=["gated_deltanet"],
        branch_options={"gated_deltanet": {"heads": 400, "key_size": 2, "value_size": 3}},
    )
    layer: Any = PHAForCausalLM(config).model.get_submodule("layers.0.branches.gated_deltanet")
    assert_uniform(layer.A_log.exp(), 0, 16)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert_uniform(dt.log(), math.log(1e-3), math.log(1e-1))
    assert_uniform(layer.conv_weight, -0.5, 0.5)
    assert torch.equal(layer.norm.weight, torch.ones(3))
    for name in ("W_q", "W_k", "W_v", "W_a", "W_b", "W_g", "W_o"):
        spread = float(layer.get_submodule(name).weight.detach().std())
        assert spread == pytest.approx(0.02, rel=0.02), name


def test_diagnostics_are_its_decays_and_its_strengths() -> None:
    layer = GatedDeltaNet(small(), 0, **SHAPE)
    z = torch.randn(2, 5, 24)
    found = layer.diagnostics(z)
    dt = torch.nn.functional.softplus(layer.W_a(z) + layer.dt_bias)
    torch.testing.assert_close(found.decays, (-layer.A_log.exp() * dt).exp())
    torch.testing.assert_close(found.gates, layer.W_b(z).sigmoid())
