"""The layer of Mehta et al. written out, its options, its starting values, its state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.mixers import MehtaGSS
from pha.model import ArchitectureConfig, Backbone
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import dss
from pha.utils.errors import PHAError
from tests.model.common import States, plain_context, scramble, small

SHAPE = {"channels": 5, "modes": 7, "expansion": 2}
EPS32 = torch.finfo(torch.float32).eps


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def literal_forward(layer: MehtaGSS, z: Tensor) -> Tensor:
    """The equations, one sequence and one time step after the other."""
    W_u, W_v, W_y, W_o = (m.weight for m in (layer.W_u, layer.W_v, layer.W_y, layer.W_o))
    Lambda = torch.complex(-layer.Lambda_re.exp(), layer.Lambda_im.exp())
    C = torch.complex(layer.C_re, layer.C_im) * (Lambda.exp() - 1) / Lambda
    sequences = []
    for z_Td in z:
        h = torch.zeros_like(C)
        outputs = []
        for z_t in z_Td:
            u_t, v_t = gelu(W_u @ z_t), gelu(W_v @ z_t)
            h = Lambda.exp() * h + v_t[:, None]
            y_t = (C * h).sum(1).real + layer.D * v_t
            outputs.append(W_o @ ((W_y @ y_t) * u_t))
        sequences.append(torch.stack(outputs))
    return torch.stack(sequences)


def make_layer(**overrides: Any) -> MehtaGSS:
    torch.manual_seed(0)
    return scramble(MehtaGSS(small(**overrides), 0, **SHAPE))


def test_values_and_gradients_equal_the_equations() -> None:
    layer = make_layer().double()
    z = torch.randn(2, 13, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 13, 24, dtype=torch.float64)
    parameters = {"z": z, **dict(layer.named_parameters())}
    linear = {"W_u.weight", "W_v.weight", "W_y.weight", "W_o.weight"}
    assert set(parameters) == {"z", "Lambda_re", "Lambda_im", "C_re", "C_im", "D", *linear}
    actual = layer(z, plain_context(small(), 13))
    expected = literal_forward(layer, z)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    for name, x, e in zip(
        parameters,
        torch.autograd.grad((actual * weight).sum(), list(parameters.values())),
        torch.autograd.grad((expected * weight).sum(), list(parameters.values())),
        strict=True,
    ):
        assert ((x - e).abs().max() / e.abs().max()).item() <= 1e-12, name


def test_defaults_are_those_of_the_source() -> None:
    layer = MehtaGSS(ArchitectureConfig(), 0)
    assert layer.W_u.weight.shape == (4 * 608, 608)
    assert layer.W_v.weight.shape == (256, 608)
    assert layer.W_y.weight.shape == (4 * 608, 256)
    assert layer.C_re.shape == layer.C_im.shape == (256, 512)
    assert layer.Lambda_re.shape == layer.Lambda_im.shape == (512,)
    assert layer.D.shape == (256,)


@pytest.mark.parametrize(
    ("name", "value"),
    [("channels", 0), ("channels", 2.5), ("modes", -1), ("modes", "many"), ("expansion", 0.5)],
)
def test_bad_options_are_refused_by_name(name: str, value: Any) -> None:
    config = small(branches=["mehta_gss"], branch_options={"mehta_gss": {name: value}})
    with pytest.raises(PHAError, match=f"model: {name} of branch mehta_gss"):
        Backbone(config)


def test_the_state_space_starts_standard_normal_by_the_language_model_too() -> None:
    config = PHAConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=1,
        branches=["mehta_gss"],
        branch_options={"mehta_gss": {"channels": 2000, "modes": 2000}},
    )
    layer = PHAForCausalLM(config).model.get_submodule("layers.0.branches.mehta_gss")
    for name in ("Lambda_re", "Lambda_im", "C_re", "C_im", "D"):
        values = getattr(layer, name).detach().double().flatten()
        # Five standard errors of the mean and of the standard deviation.
        assert abs(float(values.mean())) <= 5 / values.numel() ** 0.5, name
        assert abs(float(values.std()) - 1) <= 5 / (2 * values.numel()) ** 0.5, name


@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_bfloat16_inputs_are_computed_in_float32(
    how: str, spy: Callable[[str], dict[str, Any]]
) -> None:
    layer = make_layer()
    if how == "cast":
        layer = layer.bfloat16()
        layer.Lambda_re.data = layer.Lambda_re.data.float()
    seen = spy("pha.mixers.mehta.dss")
    z = torch.randn(2, 50, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = layer(z if how == "autocast" else z.bfloat16(), plain_context(small(), 50))
    (v, *rest), (y, _) = seen["inputs"], seen["outputs"]
    assert output.dtype == v.dtype == y.dtype == torch.bfloat16
    # Rounded to bfloat16 once, at the end.
    exact = dss(v.double(), *rest)[0]
    wrong = (y.double() - exact).abs() - 2**-8 * exact.abs()
    assert float(wrong.max()) <= 1e-5


def test_state_is_carried_through_the_cache() -> None:
    layer = make_layer().double()
    z = torch.randn(2, 11, 24, dtype=torch.float64)
    whole = layer(z, plain_context(small(), 11))
    cache = States()
    pieces = [
        layer(piece, plain_context(small(), piece.shape[1], cache=cache))
        for piece in z.split([4, 1, 6], 1)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-13)
    assert cache.kept[0].shape == (2, 5, 7, 2)


def test_padding_puts_nothing_into_the_state() -> None:
    layer = make_layer().double()
    z = torch.randn(1, 9, 24, dtype=torch.float64)
    tokens = torch.arange(9)[None] >= 4
    cache, alone_cache = States(), States()
    padded = layer(z, plain_context(small(), 9, token_mask=tokens, cache=cache))
    alone = layer(z[:, 4:], plain_context(small(), 5, cache=alone_cache))
    torch.testing.assert_close(padded[:, 4:], alone, rtol=0, atol=1e-13)
    torch.testing.assert_close(cache.kept, alone_cache.kept, rtol=0, atol=1e-14)
