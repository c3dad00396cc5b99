"""Retention (Sun et al., 2023, arXiv 2307.08621): linear attention with a decay of each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pha.mixers.common import check_sizes
from pha.model.attention import rotary_angles
from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.model.norm import RMSNorm
from pha.ops import linear_attention, rotate, swiglu
from pha.ops.linear_attention.chunked import chunked_flops
from pha.ops.precision import accumulation_type, exponent_type
from pha.utils.errors import PHAError


@register_branch("retnet")
class Retention(Branch):
    """A matrix state per head with a constant decay, read through a norm and a gate.

    q, k = W_q z, W_k z / sqrt(K), turned by rotary angles;   v = W_v z, of 2 d channels
    S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T,   y_t = S_t^T q_t,   h = 0, 1, ...
    out = W_o(RMSNorm(y) * SiLU(W_g z)), the norm of each head

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        heads: H.

    Raises:
        PHAError: heads that do not divide d into even sizes.
    """

    in_pieces = True
    states = ("S",)
    unit_gain = ("W_q", "W_k")

    def __init__(self, config: ArchitectureConfig, layer_idx: int, heads: int = 3) -> None:
        super().__init__(config, layer_idx)
        check_sizes("retnet", heads=heads)
        d = config.hidden_size
        if d % (2 * heads):
            raise PHAError(
                f"model: heads of branch retnet is {heads}; it must divide {d}, the hidden_size, "
                "into even sizes"
            )
        self.heads, self.rope_theta = heads, config.rope_theta
        self.W_q = nn.Linear(d, d, bias=False)
        self.W_k = nn.Linear(d, d, bias=False)
        self.W_v = nn.Linear(d, 2 * d, bias=False)
        self.W_g = nn.Linear(d, 2 * d, bias=False)
        self.W_o = nn.Linear(2 * d, d, bias=False)
        self.norm = RMSNorm(2 * d // heads, config.rms_norm_eps)

    def reset_parameters(self) -> None:
        """Gains of one."""
        self.norm.reset_parameters()

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached state."""
        q, k, v = (W(z).unflatten(-1, (self.heads, -1)) for W in (self.W_q, self.W_k, self.W_v))
        angles = rotary_angles(context.positions, q.shape[-1], self.rope_theta)
        wide = accumulation_type(q)  # rounded, angles would be too
        q, k = (rotate(x.to(wide).transpose(1, 2), *angles).transpose(1, 2) for x in (q, k))
        g = self._log_decays(z.device).expand(*z.shape[:2], -1)
        y, S = linear_attention(
            *(q, k * k.shape[-1] ** -0.5, v, g, None, self.past(context, "S")),
            *(context.document_starts, context.token_mask, context.cache is not None),
            pieces=context.pieces,
        )
        self.keep(context, S=S)
        return self.W_o(swiglu(self.W_g(z), self.norm(y).flatten(2)))

    def _log_decays(self, device: torch.device) -> Tensor:
        """log(1 - 2^(-5 - h)) of each head."""
        head = torch.arange(self.heads, device=device, dtype=exponent_type(device))
        return torch.log1p(-(2.0 ** (-5 - head)))

    def flops(self, length: int) -> float:
        """Of linear attention."""
        K = self.W_q.out_features // self.heads
        return chunked_flops(self.heads, self.heads, K, 2 * K, length, False)

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """Its decays, which are fixed."""
        return Diagnostics(decays=self._log_decays(z.device).exp())
