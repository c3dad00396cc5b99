"""A mixer against its equations written out: values and the gradients of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pha.model import Branch
from tests.model.common import plain_context, scramble, small

Literal = Callable[[Any, Tensor], list[Tensor]]
"""A layer and one sequence (T, d) to the outputs (d,) of all steps."""


def check_equations(layer: Branch, literal: Literal, T: int = 13) -> None:
    """Hold a layer to its equations in float64, at parameters off their starting values."""
    layer = scramble(layer).double()
    z = torch.randn(2, T, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, T, 24, dtype=torch.float64)
    parameters = {"z": z, **dict(layer.named_parameters())}
    actual = layer(z, plain_context(small(), T))
    expected = torch.stack([torch.stack(literal(layer, z_Td)) for z_Td in z])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for name, x, e in zip(
        parameters,
        torch.autograd.grad((actual * weight).sum(), list(parameters.values())),
        torch.autograd.grad((expected * weight).sum(), list(parameters.values())),
        strict=True,
    ):
        assert ((x - e).abs().max() / e.abs().max()).item() <= 1e-11, name


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def rms(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
    return gain * x / (x.square().mean() + eps).sqrt()


def convolved(inputs: list[Tensor], weight: Tensor) -> Tensor:
    """The last step of a causal convolution of the inputs (C,) so far with w taps (C, 1, w)."""
    w = weight.shape[-1]
    last = inputs[-w:]
    return sum(weight[:, 0, w - len(last) + i] * x for i, x in enumerate(last))  # type: ignore


def assert_uniform(x: Tensor, low: float, high: float) -> None:
    """Within the limits, and with the mean and spread of what is uniform between them."""
    x = x.detach().double().flatten()
    width, error = high - low, 5 / x.numel() ** 0.5  # five standard errors, or more
    assert low - 1e-6 <= float(x.min())
    assert float(x.max()) <= high + 1e-6
    assert abs(float(x.mean()) - (low + high) / 2) <= error * width / 12**0.5
    assert abs(float(x.std()) / (width / 12**0.5) - 1) <= error
