"""One layer: branches in parallel (the paper's) or in sequence (its control), then the FFN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pha.model.branches import Context, make_branches
from pha.model.config import ArchitectureConfig
from pha.model.ffn import SwiGLU
from pha.model.mixing import LearnableMixing
from pha.model.norm import RMSNorm


class Residual(nn.Module):
    """The residual connection around f, in either sound reading of the paper's alpha.

    pre:  x <- x + f(RMSNorm(x)) / alpha
    post: x <- RMSNorm(alpha x + f(x))          (DeepNorm)

    It is used as `x = residual(x, f(residual.enter(x)))`.
    """

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.post = config.residual == "post"
        self.alpha = config.residual_alpha

    def enter(self, x: Tensor) -> Tensor:
        """What f is applied to, (B, T, d)."""
        return x if self.post else self.norm(x)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x with y = f(...) added, (B, T, d)."""
        if self.post:
            return self.norm(torch.add(self.dropout(y), x, alpha=self.alpha))
        return torch.add(x, self.dropout(y), alpha=1 / self.alpha)


class FeedForward(nn.Module):
    """The end of a block of either kind: the primary FFN around its residual, if it has a size."""

    has_primary_ffn: bool

    def add_primary_ffn(self, config: ArchitectureConfig) -> None:
        """Make the FFN, unless the configuration gives it no size."""
        inner = config.ffn_size(config.primary_ffn_expansion)
        self.has_primary_ffn = inner > 0
        if self.has_primary_ffn:
            self.primary_ffn = SwiGLU(config.hidden_size, inner)
            self.ffn_residual = Residual(config)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        if not self.has_primary_ffn:
            return x
        return self.ffn_residual(x, self.primary_ffn(self.ffn_residual.enter(x)))


class ParallelBlock(FeedForward):
    """z = RMSNorm(x);  x <- x + mix_i(branch_i(z)) / alpha;  x <- x + FFN(RMSNorm(x)) / alpha.

    That is the pre-norm reading; for the other see `Residual`.
    """

    def __init__(self, config: ArchitectureConfig, layer_idx: int) -> None:
        super().__init__()
        self.branches = make_branches(config, layer_idx)
        self.mixing = LearnableMixing(
            list(self.branches),
            config.hidden_size,
            config.rms_norm_eps,
            learned=config.mixing_weights == "learned",
            normed=config.branch_norms,
        )
        self.mix_residual = Residual(config)
        self.add_primary_ffn(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        z = self.mix_residual.enter(x)
        outputs = {name: branch(z, context) for name, branch in self.branches.items()}
        x = self.mix_residual(x, self.mixing(outputs))
        return self.feed_forward(x)


class SequentialBlock(FeedForward):
    """The same branches one after the other, each a sublayer of its own, then the primary FFN."""

    def __init__(self, config: ArchitectureConfig, layer_idx: int) -> None:
        super().__init__()
        self.branches = make_branches(config, layer_idx)
        self.residuals = nn.ModuleDict({name: Residual(config) for name in self.branches})
        self.add_primary_ffn(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        for name, branch in self.branches.items():
            residual: Residual = self.residuals[name]  # type: ignore[assignment]
            x = residual(x, branch(residual.enter(x), context))
        return self.feed_forward(x)


BLOCKS: dict[str, type[ParallelBlock] | type[SequentialBlock]] = {
    "parallel": ParallelBlock,
    "sequential": SequentialBlock,
}
