"""Linear attention of every kind and retention, written out; options, sizes, starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pha.mixers import LinearAttention, Retention
from pha.model import ArchitectureConfig, Backbone
from pha.model.attention import rotary_angles
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.utils.errors import PHAError
from tests.mixers.common import check_equations, rms, sigmoid, silu
from tests.model.common import plain_context, small

H, K, M = 4, 6, 50
MAPS: list[dict[str, Any]] = [
    {"feature_map": "elu"},
    {"feature_map": "dpfp", "nu": 2},
    {"feature_map": "cosformer", "max_length": M},
    {"feature_map": "hedgehog"},
]
KINDS = [options | {"rule": "sum"} for options in MAPS]
KINDS += [options | {"rule": "delta", "norm": norm} for options in MAPS for norm in ("sum", "l2")]


def phi(layer: LinearAttention, x: Tensor, which: str, h: int, t: int) -> Tensor:
    """The features of one head's query or key, (K,), at position t."""
    if layer.feature_map == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    if layer.feature_map == "dpfp":
        both = torch.cat([x.clamp(min=0), (-x).clamp(min=0)]).unbind()
        n = len(both)
        return torch.stack([both[i] * both[(i - j) % n] for j in (1, 2) for i in range(n)])
    if layer.feature_map == "cosformer":
        angle = math.pi * t / (2 * M)
        return torch.cat([x.clamp(min=0) * math.cos(angle), x.clamp(min=0) * math.sin(angle)])
    W, b = (layer.get_parameter(f"map_{kind}{which}")[h] for kind in ("", "bias_"))
    e = W @ x + b
    return torch.cat([e.exp() / e.exp().sum(), (-e).exp() / (-e).exp().sum()])


def literal(layer: LinearAttention, z_Td: Tensor) -> list[Tensor]:
    """The sum rule as the weighted average of all values so far, the delta rule as a state."""
    keys: list[list[Tensor]] = [[] for _ in range(H)]
    values: list[list[Tensor]] = [[] for _ in range(H)]
    states = [torch.zeros((), dtype=z_Td.dtype)] * H
    outputs = []
    for t, z_t in enumerate(z_Td):
        q, k, v = (W(z_t).view(H, K) for W in (layer.W_q, layer.W_k, layer.W_v))
        heads = []
        for h in range(H):
            q_h, k_h = phi(layer, q[h], "q", h, t), phi(layer, k[h], "k", h, t)
            if layer.delta:
                order = 1 if layer.norm == "sum" else 2
                q_h, k_h = (x / x.norm(order).clamp(min=1e-12) for x in (q_h, k_h))
                beta = sigmoid(layer.W_beta.weight @ z_t)[h]
                S = states[h] + torch.zeros(len(k_h), K, dtype=z_t.dtype)
                states[h] = S + beta * torch.outer(k_h, v[h] - S.T @ k_h)
                heads.append(states[h].T @ q_h / math.sqrt(K))
                continue
            keys[h].append(k_h)
            values[h].append(v[h])
            weights = torch.stack(keys[h]) @ q_h
            total = weights.sum()
            cosformer = layer.feature_map == "cosformer"
            total = total.clamp(min=1e-6) if cosformer else total + 1e-5
            heads.append(weights @ torch.stack(values[h]) / total)
        outputs.append(layer.W_o(torch.cat(heads)))
    return outputs


@pytest.mark.parametrize("options", KINDS, ids=lambda x: "-".join(map(str, x.values())))
def test_values_and_gradients_equal_the_equations(options: dict[str, Any]) -> None:
    check_equations(LinearAttention(small(), 0, heads=H, **options), literal)


@pytest.mark.parametrize(
    ("options", "squares"),
    [
        ({}, 4.0),
        ({"rule": "delta", "feature_map": "dpfp", "nu": 3}, 4 + 12 / 768),
        ({"feature_map": "cosformer"}, 4 + 4 / 768),
        ({"feature_map": "hedgehog"}, 4 + 2 * 12 * (64**2 + 64) / 768**2),
    ],
)
def test_sizes_in_squares_of_the_width(options: dict[str, Any], squares: float) -> None:
    config = ArchitectureConfig(hidden_size=768, num_attention_heads=12)
    layer = LinearAttention(config, 0, **options)
    assert sum(p.numel() for p in layer.parameters()) == round(squares * 768**2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 5}, "heads of branch linear_attention is 5; it must divide 24"),
        ({"nu": 0}, "nu of branch"),
        ({"max_length": 2.5}, "max_length of branch"),
        ({"feature_map": "relu"}, "feature_map .*choose elu or dpfp or cosformer or hedgehog"),
        ({"rule": "max"}, "rule .*choose sum or delta"),
        ({"norm": "l1", "rule": "delta"}, "norm .*choose sum or l2"),
        ({"norm": "l2"}, "norm l2 .*needs rule delta"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    options = {"linear_attention": {"heads": 4} | options}
    with pytest.raises(PHAError, match=f"model: {words}"):
        Backbone(small(branches=["linear_attention"], branch_options=options))


@pytest.mark.parametrize("options", KINDS, ids=lambda x: "-".join(map(str, x.values())))
def test_each_kind_carries_its_state_over_documents_and_padding(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = PHAConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        branches=["linear_attention"],
        branch_options={"linear_attention": {"heads": H} | options},
        initializer_range=0.3,
    )
    model, ids = PHAForCausalLM(config).double().eval(), torch.randint(37, (1, 70))
    starts = torch.zeros(1, 70, dtype=torch.bool)
    starts[:, [0, 11, 40]] = True
    whole = model(ids, document_starts=starts).logits
    apart = torch.cat([model(piece).logits for piece in ids.split([11, 29, 30], 1)], 1)
    torch.testing.assert_close(whole, apart, rtol=0, atol=1e-11)
    cache, pieces = None, []
    for a, b in ((0, 9), (9, 10), (10, 70)):
        found = model(
            ids[:, a:b],
            document_starts=starts[:, :b],
            past_key_values=cache,
            use_cache=True,
        )
        cache = found.past_key_values
        pieces.append(found.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-11)
    padded = F.pad(ids, (7, 0))
    mask = F.pad(torch.ones_like(ids), (7, 0))
    logits = model(padded, attention_mask=mask).logits[:, 7:]
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-11)


def test_beyond_its_length_cosformer_weighs_nothing_below_zero() -> None:
    layer = LinearAttention(small(), 0, heads=H, feature_map="cosformer", max_length=8).double()
    z = torch.randn(1, 40, 24, dtype=torch.float64)
    with torch.no_grad():
        layer.W_v.weight.zero_()
        layer.W_v.bias.fill_(1)
        layer.W_o.weight.copy_(torch.eye(24))
    y = layer(z, plain_context(small(), 40)) - layer.W_o.bias
    # An average of ones, or zero where no feature of a token meets one of a key.
    assert bool(((y - 1).abs() < 1e-12).logical_or(y == 0).all())


def test_hedgehog_starts_with_the_identity_in_the_language_model_too() -> None:
    options = {"linear_attention": {"heads": 2, "feature_map": "hedgehog"}}
    config = PHAConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=1,
        branches=["linear_attention"],
        branch_options=options,
    )
    layer: Any = PHAForCausalLM(config).model.get_submodule("layers.0.branches.linear_attention")
    for which in "qk":
        assert torch.equal(layer.get_parameter(f"map_{which}"), torch.eye(12).expand(2, 12, 12))
        assert not layer.get_parameter(f"map_bias_{which}").any()


def retention(layer: Retention, z_Td: Tensor) -> list[Tensor]:
    S, outputs = [torch.zeros(6, 12, dtype=z_Td.dtype)] * 4, []
    for t, z_t in enumerate(z_Td):
        q, k = (W(z_t).view(4, 6) for W in (layer.W_q, layer.W_k))
        turn = torch.complex(*rotary_angles(torch.tensor(t), 6, 10000.0))
        q, k = (torch.complex(x[:, :3], x[:, 3:]) * turn for x in (q, k))
        q, k = (torch.cat([x.real, x.imag], -1) for x in (q, k))
        v, heads = layer.W_v(z_t).view(4, 12), []
        for h in range(4):
            S[h] = (1 - 2.0 ** (-5 - h)) * S[h] + torch.outer(k[h] / math.sqrt(6), v[h])
            heads.append(rms(S[h].T @ q[h], layer.norm.weight))
        outputs.append(layer.W_o(torch.cat(heads) * silu(layer.W_g(z_t))))
    return outputs


def test_retention_equals_its_equations() -> None:
    check_equations(Retention(small(), 0, heads=4), retention)


def test_retention_has_eight_square_matrices() -> None:
    layer = Retention(ArchitectureConfig(hidden_size=768), 0)
    assert sum(p.numel() for p in layer.parameters()) == 8 * 768**2 + 512


@pytest.mark.parametrize("heads", [0, 5, 8])
def test_heads_that_do_not_divide_retention_are_refused(heads: int) -> None:
    options = {"retnet": {"heads": heads}}
    with pytest.raises(PHAError, match="model: heads of branch retnet"):
        Backbone(small(branches=["retnet"], branch_options=options))
