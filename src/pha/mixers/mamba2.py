"""Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060): linear attention whose input sets its decay."""

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
from pha.utils.errors import PHAError

TAPS = 4


@register_branch("mamba2")
class Mamba2(Branch):
    """A matrix state per head, written with B, read with C, which all heads share.

    [gate, x, B, C, dt] = W_in z,   [x, B, C] <- SiLU(conv([x, B, C])),   dt <- softplus(dt + b)
    S_t = exp(-A dt_t) S_{t-1} + B_t (dt_t x_t)^T,   y_t = S_t^T C_t + D x_t
    out = W_o RMSNorm(y * SiLU(gate))

    A = exp(A_log), b and D are a number for each head, float32 whatever the rest is in.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        state_size: N, entries of B and C.
        head_size: P, channels of x in a head.
        expansion: channels of x over d.

    Raises:
        PHAError: an option that is no whole number of at least 1, or heads that do not divide x.
    """

    in_pieces = True
    states = ("conv", "S")
    float32 = ("A_log", "dt_bias", "D")

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_idx: int,
        state_size: int = 128,
        head_size: int = 64,
        expansion: int = 2,
    ) -> None:
        super().__init__(config, layer_idx)
        check_sizes("mamba2", state_size=state_size, head_size=head_size, expansion=expansion)
        d, inner = config.hidden_size, expansion * config.hidden_size
        if inner % head_size:
            raise PHAError(
                f"model: head_size of branch mamba2 is {head_size}; it must divide {inner}, "
                "expansion times hidden_size"
            )
        self.head_size, heads, mixed = head_size, inner // head_size, inner + 2 * state_size
        self.sizes = [inner, mixed, heads]
        self.W_in = nn.Linear(d, sum(self.sizes), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(mixed, 1, TAPS))
        self.conv_bias = nn.Parameter(torch.empty(mixed))
        self.A_log = fp32(heads)
        self.dt_bias = fp32(heads)
        self.D = fp32(heads)
        self.norm = RMSNorm(inner, config.rms_norm_eps)
        self.W_o = nn.Linear(inner, d, bias=False)
        # Residual layers of the model, among which the authors share out the output's scale.
        self.depth = config.num_hidden_layers * (2 if config.primary_ffn_expansion else 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors do: A uniform in [1, 16], dt log-uniform, D one, torch's linear layers."""
        nn.init.uniform_(self.A_log, 1, 16).log_()
        start_time_steps(self.dt_bias)
        nn.init.ones_(self.D)
        self.norm.reset_parameters()
        for x in (self.conv_weight, self.conv_bias):
            start_as_torch_does(x, TAPS)
        start_as_torch_does(self.W_in.weight, self.W_in.in_features)
        start_as_torch_does(self.W_o.weight, self.W_o.in_features * self.depth)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached states."""
        inner, mixed, heads = self.sizes
        flags = context.document_starts, context.token_mask
        keep = context.cache is not None
        gate, x, dt = self.W_in(z).split(self.sizes, -1)
        taps, past = self.conv_weight.squeeze(1), self.past(context, "conv")
        x, conv = short_convolution(
            x, taps, self.conv_bias, past, *flags, last_state=keep, pieces=context.pieces
        )
        N = (mixed - inner) // 2
        x, B, C = F.silu(x).split([inner, N, N], -1)
        x, dt = x.unflatten(-1, (heads, self.head_size)), self._time_steps(dt)
        g = -self.A_log.exp() * dt
        y, S = linear_attention(
            *(C.unsqueeze(2), B.unsqueeze(2), (x * dt.unsqueeze(-1)).to(x.dtype), g, None),
            *(self.past(context, "S"), *flags, keep, context.pieces),
        )
        self.keep(context, conv=conv, S=S)
        y = (y + self.D.unsqueeze(-1) * x).flatten(2)
        return self.W_o(self.norm(swiglu(gate, y.to(gate.dtype))))

    def _time_steps(self, dt: Tensor) -> Tensor:
        return F.softplus(dt.to(accumulation_type(dt)) + self.dt_bias)

    def flops(self, length: int) -> float:
        """Of linear attention, whose queries and keys all heads share."""
        inner, mixed, heads = self.sizes
        N, P = (mixed - inner) // 2, self.head_size
        return chunked_flops(heads, 1, N, P, length, False)

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """The decays of its states at these tokens."""
        dt = self._time_steps(self.W_in(z)[..., -self.sizes[-1] :])
        return Diagnostics(decays=(-self.A_log.exp() * dt).exp())
