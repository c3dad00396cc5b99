"""Eq. 2 with an output gate, a convolution and a time step from the input, written out."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.mixers import ExtendedGSS
from pha.model import GatedStateSpace
from pha.model.gss import GROUP
from pha.utils.errors import PHAError
from tests.mixers.common import check_equations, convolved, sigmoid, silu, softplus
from tests.model.common import plain_context, small
from tests.modeling.common import run_in_pieces, scrambled, small_config, tokens

SWITCHES = ("output_gate", "convolution", "input_dt")
ALL = [dict(zip(SWITCHES, on, strict=True)) for on in product([False, True], repeat=3)]


def literal(layer: Any, z: Tensor) -> list[Tensor]:
    """One step after the other."""
    h, inputs, outputs = torch.zeros_like(layer.log_A), [], []
    for z_t in z:
        inputs.append(layer.W_B.weight @ z_t)
        v, dt = inputs[-1], layer.log_dt.exp()
        if layer.convolution:
            v = convolved(inputs, layer.taps[:, None]) + layer.c
        if layer.input_dt:
            dt = softplus(layer.W_dt.weight @ z_t + (dt.exp() - 1).log())
        a = (-dt.repeat_interleave(GROUP) * layer.log_A.exp()).exp()
        h = a * h + (1 - a**2).sqrt() * sigmoid(layer.W_g.weight @ z_t) * v
        read = h * silu(layer.W_o.weight @ z_t) if layer.output_gate else h
        outputs.append(layer.W_C.weight @ read)
    return outputs


@pytest.mark.parametrize("options", ALL, ids=str)
def test_values_and_gradients_equal_the_equations(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    check_equations(ExtendedGSS(small(), 0, **options), literal)


def test_with_nothing_on_it_is_the_paper_s() -> None:
    torch.manual_seed(0)
    plain = GatedStateSpace(small(), 0)
    torch.manual_seed(0)
    extended = ExtendedGSS(small(), 0)
    z = torch.randn(2, 9, 24)
    context = plain_context(small(), 9)
    assert torch.equal(extended(z, context), plain(z, context))
    assert extended.flops(9) == plain.flops(9)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_any_split_equals_the_whole(options: dict[str, bool]) -> None:
    config = small_config(branches=["extended_gss"], branch_options={"extended_gss": options})
    model, ids = scrambled(config).double(), tokens(2, 29)
    whole = model(ids).logits
    torch.testing.assert_close(run_in_pieces(model, ids, [1, 3, 16]), whole, rtol=0, atol=1e-11)


def test_a_time_step_from_the_input_starts_near_that_of_the_paper() -> None:
    torch.manual_seed(0)
    layer = ExtendedGSS(small(state_size=64), 0, input_dt=True)
    layer.W_dt.weight.data.normal_(std=0.02)
    a, _ = layer.decays_of(torch.zeros(1, 1, 24))
    torch.testing.assert_close(a[0, 0], layer.decay_and_scale()[0])
    a, b = layer.decays_of(torch.randn(1, 100, 24) * 100)
    assert 0 <= float(a.min()) <= float(a.max()) <= 1
    torch.testing.assert_close(a.square() + b.square(), torch.ones_like(a))


def test_a_switch_of_words_is_refused() -> None:
    with pytest.raises(PHAError, match="input_dt of branch extended_gss is 'false'; true or false"):
        ExtendedGSS(small(), 0, input_dt="false")  # type: ignore[arg-type]
