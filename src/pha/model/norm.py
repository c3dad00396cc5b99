"""RMSNorm that hands the next matrix product its own type."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pha.ops import rms_norm
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

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Normalise the last dimension, and multiply by a scalar `scale` where one is given.

        Scaling the gain costs nothing; scaled after it, the result would have to be kept as well.
        """
        gain: Tensor = self.weight
        if scale is not None:
            gain = gain.to(torch.promote_types(gain.dtype, scale.dtype)) * scale
        return rms_norm(x, gain, self.eps, compute_type(x))
