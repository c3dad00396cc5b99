"""Mamba and the quasi-recurrent layer written out, and how they start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.mixers import QRNN, Mamba
from pha.model import ArchitectureConfig, Backbone
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.utils.errors import PHAError
from tests.model.common import plain_context, scramble, small


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def literal_mamba(layer: Mamba, z_Td: Tensor) -> Tensor:
    """The equations, one time step after the other, one state after the other."""
    A, h, outputs, xs = -layer.log_A.exp(), torch.zeros_like(layer.log_A), [], []
    n, N = A.shape
    for t, z_t in enumerate(z_Td):
        both = layer.W_in.weight @ z_t
        xs.append(both[:n])
        x = silu(layer.b + sum(layer.taps[:, 3 - k] * xs[t - k] for k in range(min(4, t + 1))))
        low = layer.W_x.weight @ x
        B, C = low[-2 * N : -N], low[-N:]
        dt = torch.log(1 + torch.exp(layer.W_dt.weight @ low[: -2 * N] + layer.b_dt))
        h = torch.stack([torch.exp(dt * A[:, i]) * h[:, i] + dt * B[i] * x for i in range(N)], 1)
        y = sum(C[i] * h[:, i] for i in range(N)) + layer.skip * x
        outputs.append(layer.W_o.weight @ (y * silu(both[n:])))
    return torch.stack(outputs)


def literal_qrnn(layer: QRNN, z_Td: Tensor) -> Tensor:
    """The equations, one time step after the other."""
    d = z_Td.shape[1]
    c, before, outputs = torch.zeros(d).double(), torch.zeros(d).double(), []
    for z_t in z_Td:
        gates = layer.W.weight @ z_t
        gates = gates if layer.V is None else gates + layer.V.weight @ before
        f, o = torch.sigmoid(gates[d : 2 * d]), torch.sigmoid(gates[2 * d :])
        c = f * c + (1 - f) * torch.tanh(gates[:d])
        outputs.append(layer.W_o.weight @ (o * c))
        before = z_t
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("cls", "literal", "layer_idx"),
    [(Mamba, literal_mamba, 0), (QRNN, literal_qrnn, 0), (QRNN, literal_qrnn, 1)],
)
def test_values_and_gradients_equal_the_equations(cls: Any, literal: Any, layer_idx: int) -> None:
    torch.manual_seed(0)
    layer = scramble(cls(small(), layer_idx)).double()
    z = torch.randn(2, 13, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 13, 24, dtype=torch.float64)
    parameters = {"z": z, **dict(layer.named_parameters())}
    actual = layer(z, plain_context(small(), 13))
    expected = torch.stack([literal(layer, z_Td) for z_Td in z])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for name, x, e in zip(
        parameters,
        torch.autograd.grad((actual * weight).sum(), list(parameters.values())),
        torch.autograd.grad((expected * weight).sum(), list(parameters.values())),
        strict=True,
    ):
        assert ((x - e).abs().max() / e.abs().max()).item() <= 1e-11, name


def test_sizes_are_those_of_the_sources() -> None:
    config = ArchitectureConfig(hidden_size=768, num_attention_heads=12, head_dim=64)
    size = sum(p.numel() for p in Mamba(config, 0).parameters())
    assert size == 768 * (2 * 1536 + 1536) + 1536 * (2 * 48 + 32 + 16 + 3 + 4)
    window_two, window_one = (
        sum(p.numel() for p in QRNN(config, i).parameters()) for i in range(2)
    )
    assert (window_two, window_one) == (7 * 768**2, 4 * 768**2)


def test_time_steps_start_log_uniform_by_the_language_model_too() -> None:
    config = PHAConfig(
        vocab_size=37, hidden_size=2000, num_hidden_layers=1, branches=["mamba"], state_size=16
    )
    layer: Any = PHAForCausalLM(config).model.get_submodule("layers.0.branches.mamba")
    dt = torch.nn.functional.softplus(layer.b_dt.detach().double()).log().sort().values
    low, high = math.log(1e-3), math.log(1e-1)
    # Kolmogorov-Smirnov: a uniform sample strays further than 1.95 / sqrt(N) once in 1000 seeds.
    ranks = (torch.arange(4000) + 0.5) / 4000
    assert float(((dt - low) / (high - low) - ranks).abs().max()) <= 1.95 / 4000**0.5
    torch.testing.assert_close(layer.log_A[7].exp(), torch.arange(1.0, 17))
    bound = layer.rank**-0.5
    assert 0.99 * bound <= layer.W_dt.weight.abs().max().item() <= bound


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("mamba", "modes", 0),
        ("mamba", "modes", 1.5),
        ("mamba", "expansion", 0),
        ("qrnn", "window", 3),
    ],
)
def test_bad_options_are_refused_by_name(name: str, option: str, value: Any) -> None:
    config = small(branches=[name], branch_options={name: {option: value}})
    with pytest.raises(PHAError, match=f"model: .*branch {name}"):
        Backbone(config)


@pytest.mark.parametrize("name", ["mamba", "rg_lru", "mehta_gss"])
@pytest.mark.parametrize("value", ["2", None, float("inf"), float("nan")])
def test_an_expansion_is_a_number(name: str, value: Any) -> None:
    config = small(branches=[name], branch_options={name: {"expansion": value}})
    with pytest.raises(PHAError, match=r"model: (an expansion|expansion of branch \w+) is"):
        Backbone(config)
