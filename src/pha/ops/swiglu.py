"""The gate of a SwiGLU: SiLU(gate) * up, in one pass that keeps only its inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
from pha.ops.testing import random_numbers, relative_error


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up.

    Args:
        gate: (..., m).
        up: (..., m), of the same type.

    Returns:
        (..., m) in that type.
    """
    return _OP(gate.device.type)(gate, up)


def swiglu_naive(gate: Tensor, up: Tensor) -> Tensor:
    """The oracle: as written, in float32 or wider."""
    dtype = accumulation_type(gate)
    return (gate.to(dtype) * gate.to(dtype).sigmoid() * up.to(dtype)).to(gate.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        # In torch 2.11 a compiled graph loses the backward pass of a function that ends in what
        # returns its own argument: an operation in place, or a cast to the same type. So casts
        # stand outside, here and in other ops.
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """PyTorch's silu, then a product; neither is kept."""
    return _SwiGLU.apply(gate, up)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, _ = random_numbers(device_type)
    return relative_error(backend, oracle, 3 * normal(3, 250, 67), normal(3, 250, 67))


_OP = Op(
    "swiglu",
    {"naive": swiglu_naive, "torch": swiglu_torch},
    {"default": "torch"},
    _check,
)
