"""Learnable static mixing of the branches, Eq. 3 and 4 of the paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.nn.norm import RMSNorm


class LearnableMixing(nn.Module):
    """fused = sum_i w_i RMSNorm_i(y_i),   w_i = softplus(theta_i) / sum_j softplus(theta_j).

    One scalar theta_i per branch and layer, equal at the start, not weight-decayed.
    """

    def __init__(self, names: list[str], hidden_size: int, eps: float) -> None:
        super().__init__()
        self.names = list(names)
        self.theta = nn.Parameter(torch.zeros(len(names), dtype=torch.float32))
        self.norms = nn.ModuleDict({name: RMSNorm(hidden_size, eps) for name in names})

    def reset_parameters(self) -> None:
        """Equal weights."""
        nn.init.zeros_(self.theta)

    def weights(self) -> Tensor:
        """w of Eq. 4, (number of branches,) float32, summing to one."""
        positive = F.softplus(self.theta.float())
        return positive / positive.sum()

    @torch.no_grad()
    def effective_shares(self) -> Tensor:
        """w_i * rms(gain_i), normalised: a branch's gain can hide what its weight says."""
        gains = torch.stack([norm.weight.float().square().mean().sqrt() for norm in self._norms()])
        shares = self.weights() * gains
        return shares / shares.sum()

    def _norms(self) -> list[RMSNorm]:
        return [self.norms[name] for name in self.names]  # type: ignore[misc]

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        """Mix branch outputs, each (B, T, d), into one (B, T, d)."""
        w = self.weights()
        normed = [self.norms[name](outputs[name]) for name in self.names]
        fused = normed[0] * w[0].to(normed[0].dtype)
        for i, y in enumerate(normed[1:], start=1):
            fused = torch.addcmul(fused, y, w[i].to(y.dtype))
        return fused
