"""Comparing a backend with its oracle: values and all gradients in one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def random_numbers(
    device: torch.device | str,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Functions of a shape to normal numbers and to uniform ones, the same each time."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    return normal, uniform


def relative_error(
    backend: Callable[..., Any], oracle: Callable[..., Any], *inputs: Tensor
) -> float:
    """Largest error of outputs and input gradients, relative to the largest oracle magnitude.

    The oracle runs in float64; the gradients are those of a fixed random weighting of the outputs.

    Args:
        backend: function of `inputs` returning a tensor or a tuple of tensors.
        oracle: the same function, plain.
        inputs: floating tensors, all differentiated.
    """
    results = []
    for function, dtype in ((backend, None), (oracle, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [
            torch.linspace(-1, 1, max(o.numel(), 1), dtype=torch.float64).sin().reshape(o.shape)
            for o in outputs
        ]
        total = sum(
            (o.double() * w.to(o.device)).sum() for o, w in zip(outputs, weights, strict=True)
        )
        gradients = torch.autograd.grad(total, leaves)
        results.append([x.detach().double() for x in (*outputs, *gradients)])
    return largest_error(*results)


def largest_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest error, each tensor's relative to its expected magnitude; NaN where there is one."""
    errors = [
        (x.double() - y).abs().max() / y.abs().max().clamp_min(1e-30)
        for x, y in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(errors).max())  # which keeps NaN, unlike Python's own `max`
