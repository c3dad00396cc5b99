"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024, arXiv 2412.06464): a decaying delta rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.mixers.common import check_sizes, fp32, start_as_torch_does, start_time_steps
from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.model.norm import RMSNorm
from pha.ops import linear_attention, short_convolution, swiglu
from pha.ops.linear_attention.chunked import chunked_flops
from pha.ops.precision import accumulation_type

TAPS = 4


@register_branch("gated_deltanet")
class GatedDeltaNet(Branch):
    """A matrix state per head that decays, and in which a key's new value replaces its old one.

    q, k = unit length of SiLU(conv(W_q z)), SiLU(conv(W_k z)),   v = SiLU(conv(W_v z))
    g = -exp(A_log) softplus(W_a z + b),   beta = sigmoid(W_b z)
    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T,   y_t = S_t^T q_t / sqrt K
    out = W_o(RMSNorm(y) * SiLU(W_g z)), the norm of each head

    A_log and b are a number for each head, float32 whatever the rest is in.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        heads: H.
        key_size: K, entries of q and k in a head.
        value_size: P, entries of v in a head.

    Raises:
        PHAError: an option that is no whole number of at least 1.
    """

    states = ("conv", "S")
    float32 = ("A_log", "dt_bias")
    unit_gain = ("W_q", "W_k")

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_idx: int,
        heads: int = 6,
        key_size: int = 96,
        value_size: int = 192,
    ) -> None:
        super().__init__(config, layer_idx)
        check_sizes("gated_deltanet", heads=heads, key_size=key_size, value_size=value_size)
        d, keys, values = config.hidden_size, heads * key_size, heads * value_size
        self.heads, self.sizes = heads, [keys, keys, values]
        self.W_q = nn.Linear(d, keys, bias=False)
        self.W_k = nn.Linear(d, keys, bias=False)
        self.W_v = nn.Linear(d, values, bias=False)
        self.W_a = nn.Linear(d, heads, bias=False)
        self.W_b = nn.Linear(d, heads, bias=False)
        self.W_g = nn.Linear(d, values, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.sizes), 1, TAPS))
        self.A_log = fp32(heads)
        self.dt_bias = fp32(heads)
        self.norm = RMSNorm(value_size, config.rms_norm_eps)
        self.W_o = nn.Linear(values, d, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """exp(A_log) uniform in [0, 16], dt log-uniform; taps as torch starts a convolution."""
        nn.init.uniform_(self.A_log, 0, 16).clamp_(min=1e-3).log_()  # the logarithm of 0 is no rate
        start_time_steps(self.dt_bias)
        self.norm.reset_parameters()
        start_as_torch_does(self.conv_weight, TAPS)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached states."""
        flags = context.document_starts, context.token_mask
        keep = context.cache is not None
        x = torch.cat([self.W_q(z), self.W_k(z), self.W_v(z)], -1)
        taps, past = self.conv_weight.squeeze(1), self.past(context, "conv")
        x, conv = short_convolution(x, taps, None, past, *flags, last_state=keep)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in F.silu(x).split(self.sizes, -1))
        q, k = _unit(q) * q.shape[-1] ** -0.5, _unit(k)
        y, S = linear_attention(
            *(q, k, v, self._log_decays(z), self.W_b(z).sigmoid()),
            *(self.past(context, "S"), *flags, keep),
        )
        self.keep(context, conv=conv, S=S)
        return self.W_o(swiglu(self.W_g(z), self.norm(y).flatten(2)))

    def _log_decays(self, z: Tensor) -> Tensor:
        a = self.W_a(z)
        # That is -softplus, whose own backward pass fails compiled where gradients are strided.
        return self.A_log.exp() * F.logsigmoid(-(a.to(accumulation_type(a)) + self.dt_bias))

    def flops(self, length: int) -> float:
        """Of the delta rule."""
        H, K, P = self.heads, *(size // self.heads for size in self.sizes[1:])
        return chunked_flops(H, H, K, P, length, True)

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """The decays of its states and what it writes with, at these tokens."""
        return Diagnostics(decays=self._log_decays(z).exp(), gates=self.W_b(z).sigmoid())


def _unit(x: Tensor) -> Tensor:
    """Of unit length, or shorter where that is next to nothing; in float32 or wider."""
    x = x.to(accumulation_type(x))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
