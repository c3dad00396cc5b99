"""Norm, feed-forward network and the learnable mixing of Eq. 3 and 4, written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.model import LearnableMixing, SwiGLU
from pha.model.norm import RMSNorm
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops.precision import compute_type
from pha.utils.errors import PHAError
from tests.model.common import scramble

NAMES = ["gss", "attention", "aux_ffn"]


def literal_rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm_by_definition(eps: float) -> None:
    norm = scramble(RMSNorm(17, eps)).double()
    x = torch.randn(3, 5, 17, dtype=torch.float64)
    torch.testing.assert_close(norm(x), literal_rms_norm(x, norm.weight, eps), rtol=0, atol=1e-14)


def test_rms_norm_returns_the_compute_type() -> None:
    norm, x = RMSNorm(17, 1e-5), torch.randn(3, 17)
    assert norm(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_type(x) == torch.bfloat16
        # One rounding, on the way out.
        assert torch.equal(norm(x), norm.float()(x).bfloat16())
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    # A float32 residual stream under a bfloat16 gain stays float32.
    assert norm(x).dtype == torch.float32


def test_swiglu_by_definition() -> None:
    ffn = scramble(SwiGLU(24, 40)).double()
    assert not any("bias" in name for name, _ in ffn.named_parameters())
    assert ffn.W_gate.weight.shape == ffn.W_up.weight.shape == (40, 24)
    z = torch.randn(2, 5, 24, dtype=torch.float64)
    gate, up = z @ ffn.W_gate.weight.T, z @ ffn.W_up.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * up) @ ffn.W_down.weight.T
    torch.testing.assert_close(ffn(z), expected, rtol=0, atol=1e-13)


@pytest.fixture
def mixing() -> LearnableMixing:
    return scramble(LearnableMixing(NAMES, 17, 1e-5), by=0.7)


def gain(mixing: LearnableMixing, name: str) -> Tensor:
    return mixing.get_parameter(f"norms.{name}.weight")


def literal_weights(mixing: LearnableMixing) -> list[float]:
    positive = [math.log1p(math.exp(t)) for t in mixing.theta.tolist()]
    return [p / sum(positive) for p in positive]


def test_mixing_equals_the_equations(mixing: LearnableMixing) -> None:
    mixing = mixing.double()
    outputs = {name: torch.randn(2, 5, 17, dtype=torch.float64) for name in NAMES}
    # As a model has it: the order of the branches is the mixing's own, not the dictionary's.
    fused = mixing(dict(reversed(outputs.items())))
    expected = sum(
        w * literal_rms_norm(outputs[name], gain(mixing, name), 1e-5)
        for name, w in zip(NAMES, mixing.weights().tolist(), strict=True)
    )
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-14)


def test_weights_are_normalised_softplus(mixing: LearnableMixing) -> None:
    w = mixing.weights()
    assert w.dtype == torch.float32
    torch.testing.assert_close(w.tolist(), literal_weights(mixing), rtol=3e-7, atol=0)
    assert abs(w.double().sum().item() - 1) <= 2e-7
    assert len(set(w.tolist())) == 3


def test_weights_are_equal_at_the_start(mixing: LearnableMixing) -> None:
    fresh = LearnableMixing(NAMES, 17, 1e-5)
    mixing.reset_parameters()
    for m in (fresh, mixing):
        assert torch.equal(m.weights(), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("extreme", [-200.0, 200.0])
def test_extreme_theta_still_gives_weights(extreme: float) -> None:
    mixing = LearnableMixing(NAMES, 17, 1e-5)
    with torch.no_grad():
        mixing.theta[1] = extreme
    w = mixing.weights()
    # softplus(200) = 200, softplus(-200) = 0 in float32, softplus(0) = ln 2.
    other = math.log(2.0)
    middle = max(extreme, 0.0)
    expected = [x / (middle + 2 * other) for x in (other, middle, other)]
    torch.testing.assert_close(w.tolist(), expected, rtol=3e-7, atol=0)


def test_effective_shares_count_the_gains(mixing: LearnableMixing) -> None:
    raw = [
        w * math.sqrt(gain(mixing, name).double().square().mean().item())
        for name, w in zip(NAMES, literal_weights(mixing), strict=True)
    ]
    expected = [x / sum(raw) for x in raw]
    torch.testing.assert_close(mixing.effective_shares().tolist(), expected, rtol=1e-6, atol=0)
    # Doubling a gain doubles its odds, and leaves the weights of Eq. 4 as they were.
    before = mixing.weights()
    shares = mixing.effective_shares()
    with torch.no_grad():
        gain(mixing, "aux_ffn").mul_(2)
    assert torch.equal(mixing.weights(), before)
    odds = mixing.effective_shares()[2] / mixing.effective_shares()[0]
    torch.testing.assert_close(odds, 2 * shares[2] / shares[0], rtol=1e-6, atol=0)


def test_gradients_of_theta_are_those_of_the_equation(mixing: LearnableMixing) -> None:
    mixing = mixing.double()
    outputs = {name: torch.randn(2, 5, 17, dtype=torch.float64) for name in NAMES}
    weight = torch.randn(2, 5, 17, dtype=torch.float64)
    (actual,) = torch.autograd.grad((mixing(outputs) * weight).sum(), mixing.theta)
    # dL/dw_i, then through w = p / sum p with p' = sigmoid(theta).
    dw = torch.stack(
        [(mixing.norms[name](outputs[name]) * weight).sum() for name in NAMES]
    ).detach()
    theta = mixing.theta.detach()
    p = torch.log1p(theta.exp())
    expected = torch.sigmoid(theta) * (dw - (p / p.sum() * dw).sum()) / p.sum()
    # The weights are float32 by contract.
    assert ((actual - expected).abs().max() / dw.abs().max()).item() <= 1e-6
    assert bool((expected.abs() > 1e-3).all())


def test_fixed_weights_are_equal_and_not_trained() -> None:
    mixing = LearnableMixing(NAMES, 17, 1e-5, learned=False)
    assert "theta" not in dict(mixing.named_parameters())
    assert "theta" in mixing.state_dict()
    outputs = {name: torch.randn(2, 3, 17) for name in NAMES}
    expected = sum(literal_rms_norm(y, torch.ones(17), 1e-5) for y in outputs.values()) / 3
    torch.testing.assert_close(mixing(outputs), expected)


def test_without_norms_the_mix_is_a_plain_weighted_sum() -> None:
    mixing = LearnableMixing(NAMES, 17, 1e-5, normed=False)
    assert [name for name, _ in mixing.named_parameters()] == ["theta"]
    with torch.no_grad():
        mixing.theta.copy_(torch.tensor([0.3, -1.0, 2.0]))
    outputs = {name: 5 * torch.randn(2, 3, 17) for name in NAMES}
    w = literal_weights(mixing)
    expected = sum(weight * y for weight, y in zip(w, outputs.values(), strict=True))
    torch.testing.assert_close(mixing(outputs), expected)
    torch.testing.assert_close(mixing.effective_shares().tolist(), w)


@pytest.mark.parametrize("options", [{"mixing_weights": "fixed"}, {"branch_norms": False}])
def test_models_of_either_kind_train_save_and_load(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = PHAConfig.from_preset(
        "pha-tiny", vocab_size=64, hidden_size=32, head_dim=8, state_size=32, **options
    )
    model = PHAForCausalLM(config)
    ids = torch.randint(64, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = PHAForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    made = again.generate(ids[:, :3], max_new_tokens=4, do_sample=False, eos_token_id=None)
    whole = [again(made[:, :length]).logits[:, -1].argmax(-1) for length in range(3, 7)]
    assert torch.equal(made[:, 3:], torch.stack(whole, 1))


def test_a_kind_of_mixing_that_there_is_not_is_refused() -> None:
    with pytest.raises(PHAError, match="choose learned or fixed"):
        PHAConfig.from_preset("pha-tiny", mixing_weights="equal")


def test_a_norm_with_a_hook_is_called() -> None:
    mixing, seen = LearnableMixing(["a", "b"], 8, 1e-6), []
    outputs = {name: torch.randn(2, 3, 8) for name in "ab"}
    before = mixing(outputs)
    mixing.norms["a"].register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(mixing(outputs), before)
    assert seen
