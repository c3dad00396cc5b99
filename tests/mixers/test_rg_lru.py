"""Griffin's recurrent block written out, its starting values, and what it shares with Eq. 2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pha.mixers import RGLRU
from pha.model import ArchitectureConfig, Backbone, GatedStateSpace
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.utils.errors import PHAError
from tests.model.common import plain_context, scramble, small


def make_layer(**options: Any) -> RGLRU:
    torch.manual_seed(0)
    return scramble(RGLRU(small(), 0, **options))


def literal_forward(layer: RGLRU, z: Tensor) -> Tensor:
    """The equations, one sequence and one time step after the other."""
    W_r, W_i = (torch.block_diag(*W.mT) for W in (layer.W_r, layer.W_i))
    sequences = []
    for z_Td in z:
        xs, h, outputs = [layer.W_x.weight @ z_t for z_t in z_Td], torch.zeros_like(layer.b), []
        for t, z_t in enumerate(z_Td):
            x = layer.b + sum(layer.taps[:, 3 - k] * xs[t - k] for k in range(min(4, t + 1)))
            r, i = torch.sigmoid(W_r @ x + layer.b_r), torch.sigmoid(W_i @ x + layer.b_i)
            a = torch.exp(-8 * torch.log(1 + torch.exp(layer.Lambda)) * r)
            h = a * h + torch.sqrt(1 - a**2) * i * x
            g = layer.W_g.weight @ z_t
            outputs.append(layer.W_o.weight @ (h * g * (1 + torch.erf(g / math.sqrt(2))) / 2))
        sequences.append(torch.stack(outputs))
    return torch.stack(sequences)


@pytest.mark.parametrize("options", [{}, {"expansion": 4 / 3, "blocks": 4}])
def test_values_and_gradients_equal_the_equations(options: dict[str, Any]) -> None:
    layer = make_layer(**options).double()
    z = torch.randn(2, 13, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 13, 24, dtype=torch.float64)
    parameters = {"z": z, **dict(layer.named_parameters())}
    actual, expected = layer(z, plain_context(small(), 13)), literal_forward(layer, z)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for name, x, e in zip(
        parameters,
        torch.autograd.grad((actual * weight).sum(), list(parameters.values())),
        torch.autograd.grad((expected * weight).sum(), list(parameters.values())),
        strict=True,
    ):
        assert ((x - e).abs().max() / e.abs().max()).item() <= 1e-11, name


def test_with_a_constant_gate_it_is_the_recurrence_of_the_paper() -> None:
    config = small(hidden_size=32, state_size=32)
    gss, layer = GatedStateSpace(config, 0).double(), RGLRU(config, 0, blocks=1).double()
    a, _ = gss.decay_and_scale()
    with torch.no_grad():
        for matrix in (gss.W_B, gss.W_C, layer.W_x, layer.W_o):
            matrix.weight.copy_(torch.eye(32))
        layer.taps.copy_(F.one_hot(torch.tensor(3), 4).expand(32, 4))
        layer.W_i.copy_(gss.W_g.weight.T[None])
        layer.b_r.fill_(1e4)
        layer.Lambda.copy_((-a.double().log() / 8).expm1().log())
    z = torch.randn(2, 50, 32, dtype=torch.float64)
    context = plain_context(config, 50)
    # Eq. 2's scale is float32.
    expected = gss(z, context) * F.gelu(layer.W_g(z))
    torch.testing.assert_close(layer(z, context), expected, rtol=0, atol=1e-6)


def test_decays_start_uniform_by_the_language_model_too() -> None:
    config = PHAConfig(
        vocab_size=37, hidden_size=4000, num_hidden_layers=1, branches=["rg_lru"], state_size=16
    )
    layer: Any = PHAForCausalLM(config).model.get_submodule("layers.0.branches.rg_lru")
    decays = layer.diagnostics(torch.zeros(0)).decays.detach().double().sort().values
    assert 0.9 - 1e-6 <= float(decays[0]) <= float(decays[-1]) <= 0.999 + 1e-6
    # Kolmogorov-Smirnov: a uniform sample strays further than 1.95 / sqrt(N) once in 1000 seeds.
    ranks = (torch.arange(4000) + 0.5) / 4000
    assert float(((decays - 0.9) / 0.099 - ranks).abs().max()) <= 1.95 / 4000**0.5
    assert not layer.b_r.any()


def test_a_gate_that_is_shut_has_a_gradient() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.b_r.fill_(-1e4)
    layer(torch.randn(1, 9, 24), plain_context(small(), 9)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


def test_size_and_bad_options() -> None:
    d = 768
    layer = RGLRU(ArchitectureConfig(hidden_size=d, num_attention_heads=12), 0)
    size = sum(p.numel() for p in layer.parameters())
    assert size == 3 * d * d + 2 * d * d // 12 + 8 * d
    for blocks in (0, 7, 2.5, True):
        config = small(branches=["rg_lru"], branch_options={"rg_lru": {"blocks": blocks}})
        with pytest.raises(PHAError, match="model: blocks of branch rg_lru is"):
            Backbone(config)
