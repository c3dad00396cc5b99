"""What several mixers share: checks of their options, parameters and their starting values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pha.ops.precision import wide
from pha.utils.errors import PHAError


def check_sizes(branch: str, least: int = 1, **sizes: Any) -> None:
    """Refuse sizes that are not whole numbers of at least 1, or `least`.

    Raises:
        PHAError: naming the option of the branch.
    """
    for name, value in sizes.items():
        if type(value) is not int or value < least:
            raise PHAError(f"model: {name} of branch {branch} is {value!r}; at least {least}")


def fp32(*shape: int) -> nn.Parameter:
    """A parameter, not in the default type, which loaders set to that of the other weights."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def start_as_torch_does(x: Tensor, fan_in: int) -> None:
    """Uniform within fan_in^(-1/2) of zero, as torch's own layers start."""
    nn.init.uniform_(x, -(fan_in**-0.5), fan_in**-0.5)


def start_time_steps(bias: Tensor) -> None:
    """softplus(bias) log-uniform in [1e-3, 1e-1], as in Mamba."""
    nn.init.uniform_(bias, math.log(1e-3), math.log(1e-1))
    dt = bias.exp()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def continuous_modes(log_A_re: Tensor, A_im: Tensor, log_dt: Tensor) -> tuple[Tensor, Tensor]:
    """A = -exp(log_A_re) + i A_im (d, N) complex128, and the time steps (d, 1) float64."""
    A = torch.complex(-wide(log_A_re).exp(), wide(A_im))
    return A, wide(log_dt).exp().unsqueeze(-1)


def start_modes(
    log_A_re: Tensor, A_im: Tensor, log_dt: Tensor, C: Tensor, dt_min: float, dt_max: float
) -> None:
    """S4D-Lin: A = -1/2 + i pi n, dt log-uniform, C (d, N, 2) complex normal of variance one."""
    nn.init.constant_(log_A_re, math.log(0.5))
    A_im.copy_(math.pi * torch.arange(A_im.shape[1]))
    nn.init.uniform_(log_dt, math.log(dt_min), math.log(dt_max))
    nn.init.normal_(C, std=0.5**0.5)
