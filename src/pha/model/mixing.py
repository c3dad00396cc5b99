"""Learnable static mixing of the branches, Eq. 3 and 4 of the paper."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.model.norm import RMSNorm


class LearnableMixing(nn.Module):
    """fused = sum_i w_i RMSNorm_i(y_i),   w_i = softplus(theta_i) / sum_j softplus(theta_j).

    One scalar theta_i per branch and layer, equal at the start, not weight-decayed.

    Args:
        names: of the branches.
        hidden_size: d.
        eps: of the norms.
        learned: whether theta is trained; else the weights stay equal.
        normed: whether there are norms; else fused = sum_i w_i y_i.
    """

    float32: ClassVar[tuple[str, ...]] = ("theta",)

    theta: Tensor

    def __init__(
        self,
        names: list[str],
        hidden_size: int,
        eps: float,
        learned: bool = True,
        normed: bool = True,
    ) -> None:
        super().__init__()
        self.names, self.eps = list(names), eps
        theta = torch.zeros(len(names), dtype=torch.float32)
        if learned:
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta)
        self.norms = nn.ModuleDict(
            {name: RMSNorm(hidden_size, eps) if normed else nn.Identity() for name in names}
        )

    def reset_parameters(self) -> None:
        """Equal weights."""
        nn.init.zeros_(self.theta)

    def weights(self) -> Tensor:
        """w of Eq. 4, (number of branches,) float32, summing to one."""
        positive = F.softplus(self.theta.float())
        return positive / positive.sum()

    @torch.no_grad()
    def effective_shares(self) -> Tensor:
        """w_i * rms(gain_i), normalised: a branch's gain can hide what its weight says.

        Without norms there are no gains, and these are the weights.
        """
        norms = [self.norms[name] for name in self.names]
        gains = [n.weight.float().square().mean().sqrt() for n in norms if isinstance(n, RMSNorm)]
        if not gains:
            return self.weights()
        shares = self.weights() * torch.stack(gains)
        return shares / shares.sum()

    def describe(self) -> dict[str, dict[str, float]]:
        """`{"weights": {branch: w}, "effective": {branch: share}}`."""
        found = {"weights": self.weights(), "effective": self.effective_shares()}
        return {
            name: dict(zip(self.names, values.tolist(), strict=True))
            for name, values in found.items()
        }

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        """Mix branch outputs, each (B, T, d), into one (B, T, d)."""
        total: Tensor | None = None
        for name, w in zip(self.names, self.weights().unbind(), strict=True):
            norm, y = self.norms[name], outputs[name]
            part = norm(y, w) if isinstance(norm, RMSNorm) else w.to(y.dtype) * norm(y)
            total = part if total is None else total + part
        assert total is not None  # a block has at least one branch
        return total
