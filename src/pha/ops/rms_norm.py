"""RMSNorm over the last dimension, which keeps nothing but its input for the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
from pha.ops.testing import random_numbers, relative_error


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """gain * x / sqrt(mean(x^2) + eps).

    Args:
        x: (..., d), any floating type.
        gain: (d,).
        eps: added to the mean square.
        dtype: of the result.

    Returns:
        (..., d). Computed in float32 or wider.
    """
    return _OP(x.device.type)(x, gain, eps, dtype)


def rms_norm_naive(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The oracle: as written."""
    wide = x.to(accumulation_type(x))
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (gain.to(wide.dtype) * normed).to(dtype)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * gain, of which only x and gain are kept. With n = x / rms(x) and g = dy gain,

    dx = (g - n mean(g n)) / rms(x),   dgain = sum over rows of dy n.
    """

    @staticmethod
    def forward(x: Tensor, gain: Tensor, eps: float) -> Tensor:
        normed, _ = _normed(x, eps)
        return normed * gain.to(normed.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gain, ctx.eps = inputs
        ctx.save_for_backward(x, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        normed, inverse = _normed(x, ctx.eps)
        dy, wide_gain = dy.to(normed.dtype), gain.to(normed.dtype)
        products = dy * normed
        dgain = products.flatten(0, -2).sum(0)
        mean = products.mul_(wide_gain).mean(-1, keepdim=True)
        dx = torch.mul(dy, wide_gain, out=products).addcmul_(normed, mean, value=-1).mul_(inverse)
        return dx.to(x.dtype), dgain.to(gain.dtype), None


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), new, and 1 / rms(x)."""
    wide = x.to(accumulation_type(x))
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    inverse = (mean_square + eps).rsqrt()
    return wide * inverse, inverse


def rms_norm_torch(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Torch's operations, with the backward pass in closed form."""
    normed: Tensor = _RMSNorm.apply(x, gain, eps)
    return normed.to(dtype)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, _ = random_numbers(device_type)
    x, gain = normal(3, 25, 67), 1 + normal(67)

    def run(function: Any) -> Any:
        return lambda x, gain: function(x, gain, 1e-6, x.dtype)

    return relative_error(run(backend), run(oracle), x, gain)


_OP = Op(
    "rms_norm", {"naive": rms_norm_naive, "torch": rms_norm_torch}, {"default": "torch"}, _check
)
