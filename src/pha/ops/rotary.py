"""What queries and keys of scaled-cosine attention go through: unit length, scale, rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
from pha.ops.testing import random_numbers, relative_error

_SHORTEST = 1e-12  # what a vector is divided by at least, as in torch


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + K/2}) of (B, H, T, K) by its angle.

    Args:
        x: (B, H, T, K), K even.
        cos: (B or 1, T, K / 2) cosines of the angles.
        sin: their sines.

    Returns:
        (B, H, T, K) in the type of x.
    """
    cos, sin = (r.unsqueeze(1).to(x.dtype) for r in (cos, sin))
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def unit_rotary(x: Tensor, scales: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x / |x| and multiply it by the scale of its head.

    Args:
        x: (B, H, T, K) queries or keys, K even.
        scales: (H,) of each head; None for ones.
        cos: (B or 1, T, K / 2), without gradient.
        sin: (B or 1, T, K / 2), without gradient.

    Returns:
        (B, H, T, K) in the type of x. Computed in float32 or wider.
    """
    return _OP(x.device.type)(x, scales, cos, sin)


def unit_rotary_naive(x: Tensor, scales: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """The oracle: as written."""
    wide = x.to(accumulation_type(x))
    y = wide / wide.square().sum(-1, keepdim=True).sqrt().clamp_min(_SHORTEST)
    return rotate(y if scales is None else y * scales.to(y.dtype)[:, None, None], cos, sin).to(
        x.dtype
    )


class _UnitRotary(torch.autograd.Function):
    """With u = x / |x| and g = dy turned back: dx = s (g - u (g.u)) / |x|, ds = g.u."""

    @staticmethod
    def forward(x: Tensor, scales: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x.to(accumulation_type(x))
        _, inverse = _lengths(wide)
        return rotate(wide, cos, sin) * (inverse * scales.view(-1, 1, 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, cos, sin = ctx.saved_tensors
        wide = x.to(accumulation_type(x))
        lengths, inverse = _lengths(wide)
        unit = wide * inverse
        g = rotate(dy.to(wide.dtype), cos, -sin)
        along = (g * unit).sum(-1, keepdim=True)
        dscales = along.sum((0, 2, 3)).to(scales.dtype)
        # A length below the shortest counts as a constant.
        dx = g.addcmul_(unit, along * (lengths >= _SHORTEST), value=-1)
        return dx.mul_(inverse * scales.view(-1, 1, 1)).to(x.dtype), dscales, None, None


def _lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """|x|, and the reciprocal of what x is divided by."""
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return lengths, lengths.clamp_min(_SHORTEST).reciprocal()


def unit_rotary_torch(x: Tensor, scales: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """PyTorch's operations, of which only the inputs are kept."""
    if scales is None:
        scales = x.new_ones(x.shape[1], dtype=accumulation_type(x))
    turned: Tensor = _UnitRotary.apply(x, scales, cos, sin)
    return turned.to(x.dtype)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    x, scales, angles = normal(3, 4, 250, 18), 1 + uniform(4), normal(1, 250, 9)

    def run(function: Any) -> Any:
        return lambda x, s: function(x, s, angles.cos().to(x.dtype), angles.sin().to(x.dtype))

    return relative_error(run(backend), run(oracle), x, scales)


_OP = Op(
    "unit_rotary",
    {"naive": unit_rotary_naive, "torch": unit_rotary_torch},
    {"default": "torch"},
    _check,
)
