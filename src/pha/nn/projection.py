"""Linear layers that read the same input, as one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pha.ops.precision import compute_type

# Rows of the input from which on packing the weights costs less than it gains.
PACK_ROWS = 256


def project(z: Tensor, linears: Sequence[nn.Module]) -> list[Tensor]:
    """Apply several linear layers to one input, by one product where that can be.

    The weights stay separate parameters under their own names. They are laid one below the other
    for the product, and again for its backward pass, so that no packed copy is kept. Layers that
    something has replaced or hooked into (adapters, quantisation) are called as they are.

    Args:
        z: (..., d) input.
        linears: layers from d to n_i.

    Returns:
        z W_i^T, (..., n_i), for each layer: slices of one tensor where the product was one.
    """
    if len(linears) > 1 and z.shape[:-1].numel() >= PACK_ROWS and all(map(is_plain, linears)):
        weights = [linear.get_parameter("weight") for linear in linears]
        sizes = [weight.shape[0] for weight in weights]
        return list(_PackedLinear.apply(z, *weights).split(sizes, dim=-1))
    return [linear(z) for linear in linears]


def is_plain(linear: nn.Module) -> bool:
    """Whether calling the layer does nothing but multiply with its weight."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) is nn.Parameter
        and not is_hooked(linear)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module also calls something that was registered with it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _pack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The rows of all weights in `dtype`, one below the other."""
    sizes = [weight.shape[0] for weight in weights]
    packed = weights[0].new_empty(sum(sizes), weights[0].shape[1], dtype=dtype)
    for rows, weight in zip(packed.split(sizes), weights, strict=True):
        rows.copy_(weight)
    return packed


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, *weights: Tensor) -> Tensor:
        dtype = compute_type(z)
        ctx.save_for_backward(z, *weights)
        ctx.dtype = dtype
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z.to(dtype), _pack(weights, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, *weights = ctx.saved_tensors
        need_z, *need_weights = ctx.needs_input_grad
        with torch.autocast(z.device.type, enabled=False):
            dz = (gradient @ _pack(weights, ctx.dtype)).to(z.dtype) if need_z else None
            if not any(need_weights):
                return dz, *[None] * len(weights)
            rows = gradient.flatten(0, -2)
            dw = rows.T @ z.to(ctx.dtype).flatten(0, -2)
            parts = dw.split([weight.shape[0] for weight in weights])
            return dz, *[
                part.to(weight.dtype) if needed else None
                for part, weight, needed in zip(parts, weights, need_weights, strict=True)
            ]
