"""One layer: branches in parallel (the paper's) or in sequence (its control), then the FFN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pha.nn.branches import Branch, Sequence, make_branches
from pha.nn.config import ArchitectureConfig
from pha.nn.ffn import SwiGLU
from pha.nn.mixing import LearnableMixing
from pha.nn.norm import RMSNorm


class Residual(nn.Module):
    """One sublayer's residual connection, in either sound reading of the paper's alpha.

    pre:  x <- x + f(RMSNorm(x)) / alpha
    post: x <- RMSNorm(alpha x + f(x))          (DeepNorm)
    """

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.post = config.residual == "post"
        self.alpha = config.residual_alpha

    def forward(self, x_BTd: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply f around x, both (B, T, d)."""
        if self.post:
            return self.norm(torch.add(self.dropout(f(x_BTd)), x_BTd, alpha=self.alpha))
        return torch.add(x_BTd, self.dropout(f(self.norm(x_BTd))), alpha=1 / self.alpha)


class FeedForwardSublayer(nn.Module):
    """The end of a block of either kind: the primary FFN around its residual, if there is one."""

    has_primary_ffn: bool

    def add_primary_ffn(self, config: ArchitectureConfig) -> None:
        """Make the FFN, unless the configuration gives it no size."""
        inner = config.ffn_size(config.primary_ffn_expansion)
        self.has_primary_ffn = inner > 0
        if self.has_primary_ffn:
            self.primary_ffn = SwiGLU(config.hidden_size, inner)
            self.ffn_residual = Residual(config)

    def feed_forward(self, x_BTd: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        return self.ffn_residual(x_BTd, self.primary_ffn) if self.has_primary_ffn else x_BTd


class ParallelBlock(FeedForwardSublayer):
    """z = RMSNorm(x);  x += mix_i(branch_i(z));  x += FFN(RMSNorm(x))   (pre-norm shown)."""

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

    def forward(self, x_BTd: Tensor, sequence: Sequence) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""

        def mix(z_BTd: Tensor) -> Tensor:
            return self.mixing({n: f(z_BTd, sequence) for n, f in self.branches.items()})

        return self.feed_forward(self.mix_residual(x_BTd, mix))


class SequentialBlock(FeedForwardSublayer):
    """The same branches one after the other, each a sublayer of its own, then the primary FFN."""

    def __init__(self, config: ArchitectureConfig, layer_idx: int) -> None:
        super().__init__()
        self.branches = make_branches(config, layer_idx)
        self.residuals = nn.ModuleDict({name: Residual(config) for name in self.branches})
        self.add_primary_ffn(config)

    def forward(self, x_BTd: Tensor, sequence: Sequence) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""

        def bind(branch: nn.Module) -> Callable[[Tensor], Tensor]:
            assert isinstance(branch, Branch)
            return lambda z_BTd: branch(z_BTd, sequence)

        for name, branch in self.branches.items():
            x_BTd = self.residuals[name](x_BTd, bind(branch))
        return self.feed_forward(x_BTd)


BLOCKS: dict[str, type[ParallelBlock] | type[SequentialBlock]] = {
    "parallel": ParallelBlock,
    "sequential": SequentialBlock,
}
