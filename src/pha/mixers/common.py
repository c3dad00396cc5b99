"""What several mixers share: checks of their options, and starting values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pha.utils.errors import PHAError


def check_sizes(branch: str, **sizes: Any) -> None:
    """Refuse sizes that are not whole numbers of at least 1.

    Raises:
        PHAError: naming the option of the branch.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PHAError(f"model: {name} of branch {branch} is {value!r}; at least 1")


def start_as_torch_does(x: Tensor, fan_in: int) -> None:
    """Uniform within fan_in^(-1/2) of zero, as torch's own layers start."""
    nn.init.uniform_(x, -(fan_in**-0.5), fan_in**-0.5)


def start_time_steps(bias: Tensor) -> None:
    """softplus(bias) log-uniform in [1e-3, 1e-1], as in Mamba."""
    nn.init.uniform_(bias, math.log(1e-3), math.log(1e-1))
    dt = bias.exp()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))
