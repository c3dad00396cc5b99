"""Compressive attention against its definition written out, one query at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pha.mixers import CompressiveAttention
from pha.utils.errors import PHAError
from tests.model.common import plain_context, scramble, small

WINDOW, SLOTS, RATE = 4, 2, 3


def literal(layer: Any, z_Td: Tensor) -> list[Tensor]:
    """The outputs of all steps, each from a list of what it sees."""
    K, scale = layer.head_dim, layer.logit_scale.float().exp().double()

    def turned(x: Tensor, place: float) -> Tensor:
        angles = place * 10000.0 ** (-2 * torch.arange(K // 2, dtype=torch.float64) / K)
        angle, turn = (x.float().double() for x in (angles.cos(), angles.sin()))
        x = x.unflatten(-1, (-1, K))
        x = x / x.norm(dim=-1, keepdim=True)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle - b * turn, b * angle + a * turn], -1)

    outputs = []
    for p, z in enumerate(z_Td):
        seen = [(float(s), z_Td[s]) for s in range(max(0, p - WINDOW + 1), p + 1)]
        groups = [g for g in range(len(z_Td)) if RATE * g <= p - WINDOW]
        for g in groups[-SLOTS:]:
            inside = z_Td[RATE * g : RATE * g + RATE].detach()
            if layer.pooling == "mean":
                one = inside.sum(0) / RATE
            elif layer.pooling == "max":
                one = inside.max(0).values
            else:
                one = layer.W_c.weight.detach() @ inside.flatten()
            seen.append((RATE * g + (RATE - 1) / 2, one))
        k = torch.stack([turned(x @ layer.W_k.weight.T, place) for place, x in seen])
        v = torch.stack([(x @ layer.W_v.weight.T).unflatten(-1, (-1, K)) for _, x in seen])
        q = turned(z @ layer.W_q.weight.T, float(p))
        y = []
        for h in range(layer.heads):
            g = h * layer.kv_heads // layer.heads
            share = (scale[h] * (k[:, g] @ q[h])).softmax(0)
            y.append(share @ v[:, g])
        outputs.append(torch.cat(y) @ layer.W_o.weight.T)
    return outputs


def literal_rows(layer: Any, z: Tensor) -> Tensor:
    return torch.stack([torch.stack(literal(layer, row)) for row in z])


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_outputs_and_gradients_are_those_of_the_definition(pooling: Any) -> None:
    layer = scramble(CompressiveAttention(small(), 0, WINDOW, SLOTS, RATE, pooling)).double()
    z = torch.randn(2, 19, 24, dtype=torch.float64, requires_grad=True)
    actual, expected = layer(z, plain_context(small(), 19)), literal_rows(layer, z)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weight, leaves = torch.randn_like(actual), {"z": z, **dict(layer.named_parameters())}
    for name, x, e in zip(
        leaves,
        torch.autograd.grad((actual * weight).sum(), list(leaves.values())),
        torch.autograd.grad((expected * weight).sum(), list(leaves.values())),
        strict=True,
    ):
        limit = 1e-6 if name in layer.float32 else 1e-11
        assert ((x - e).abs().max() / e.abs().max()).item() <= limit, name


def test_a_convolution_learns_from_its_own_loss_alone() -> None:
    layer = CompressiveAttention(small(), 0, WINDOW, SLOTS, RATE)
    layer = scramble(layer).double()
    z = torch.randn(2, 19, 24, dtype=torch.float64, requires_grad=True)
    losses: list[Tensor] = []
    y = layer(z, plain_context(small(), 19, own_losses=losses))
    torch.testing.assert_close(y, literal_rows(layer, z), rtol=1e-12, atol=1e-12)
    y.sum().backward(retain_graph=True)
    assert layer.W_c.weight.grad is None
    layer.zero_grad()
    z.grad = None
    (own,) = losses
    own.backward()
    others = [p.grad for p in (z, *layer.parameters()) if p is not layer.W_c.weight]
    assert all(grad is None for grad in others)
    rate, optimizer = [], torch.optim.Adam([layer.W_c.weight], lr=3e-2)
    for _ in range(12):
        optimizer.zero_grad()
        losses.clear()
        layer(z, plain_context(small(), 19, own_losses=losses))
        losses[0].backward()
        optimizer.step()
        rate.append(losses[0].item())
    assert rate[-1] < 0.5 * rate[0]


def test_padding_adds_nothing_to_its_own_loss() -> None:
    layer = scramble(CompressiveAttention(small(), 0, WINDOW, SLOTS, RATE)).double()
    z, mask = torch.randn(1, 26, 24, dtype=torch.float64), torch.arange(26)[None] >= 7
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    losses: list[Tensor] = []
    layer(z[:, 7:], plain_context(small(), 19, own_losses=losses))
    layer(z, plain_context(small(), 26, positions, own_losses=losses, token_mask=mask))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)


def test_what_repeats_is_compressed_without_loss() -> None:
    """Groups of equal inputs and a convolution that copies one of them: nothing is lost."""
    layer = scramble(CompressiveAttention(small(), 0, WINDOW, SLOTS, RATE)).double()
    with torch.no_grad():
        layer.W_c.weight.zero_()
        layer.W_c.weight[:, :24] = torch.eye(24)
    z = torch.randn(2, 6, 24, dtype=torch.float64).repeat_interleave(RATE, 1)
    losses: list[Tensor] = []
    layer(z, plain_context(small(), 18, own_losses=losses))
    assert losses[0].item() < 1e-20
    layer(z[:, :2], plain_context(small(), 2, own_losses=losses))
    assert losses[1].item() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs one of at least its rate, 4"),
        ({"window": 3}, "it needs one of at least its rate, 4"),
        ({"window": 8, "slots": 0}, "slots of branch compressive_attention is 0"),
        ({"window": 8, "pooling": "median"}, "choose convolution or mean or max"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PHAError, match=words):
        CompressiveAttention(small(), 0, **options)
