"""SwiGLU feed-forward network, used as the primary sublayer and as the auxiliary branch."""

from __future__ import annotations

from torch import Tensor, nn

from pha.model.branches import Branch, Context, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import swiglu


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate z) * (W_up z)), without biases."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.W_gate = nn.Linear(hidden_size, inner_size, bias=False)
        self.W_up = nn.Linear(hidden_size, inner_size, bias=False)
        self.W_down = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        return self.W_down(swiglu(self.W_gate(z), self.W_up(z)))


@register_branch("aux_ffn")
class AuxiliaryFFN(Branch):
    """The auxiliary feed-forward branch of the mix."""

    in_pieces = True

    def __init__(self, config: ArchitectureConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        inner = config.ffn_size(config.auxiliary_ffn_expansion)
        self.swiglu = SwiGLU(config.hidden_size, inner)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), token by token."""
        return self.swiglu(z)
