"""In which types an op multiplies and in which it adds up."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_type(x: Tensor) -> torch.dtype:
    """The type in which matrix products on `x` run: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def accumulation_type(x: Tensor) -> torch.dtype:
    """The type in which states, softmaxes and sums over `x` are kept: float32, or x's float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def exponent_type(device: torch.device) -> torch.dtype:
    """The type of exponents that are added up before they are raised: float64 but on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where its device has none: Apple's MPS."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def narrow(x: Tensor, like: Tensor) -> Tensor:
    """What was computed with `wide` in the type of `like` and where that is."""
    return x.to(like.dtype).to(like.device)  # apart, so that MPS meets no float64 backward either
