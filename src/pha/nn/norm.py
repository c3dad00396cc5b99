"""RMSNorm that hands the next matrix product its own type."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pha.ops import mixed_norms
from pha.ops.precision import compute_type


class RMSNorm(nn.Module):
    """x / rms(x) * gain, computed in float32 or wider, returned in the compute type.

    Casting here, once, spares each of the projections that read the result a cast of its own.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def reset_parameters(self) -> None:
        """Gains of one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return mixed_norms((x,), (self.weight,), None, self.eps, compute_type(x))
