"""S4D (Gu et al. 2022, arXiv 2206.11893): S4's layer with a diagonal state matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.mixers.common import check_sizes, continuous_modes, fp32, start_modes
from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import diagonal_ssm
from pha.ops.long_convolution import long_convolution_flops
from pha.ops.precision import wide


@register_branch("s4d")
class S4D(Branch):
    """A state space of N complex modes for each channel, whose kernel does not see the input.

    h' = A h + u,   y = 2 Re(C h) + D u,   out = GLU(W_o GELU(y) + b_o),   u = z

    held over time steps dt of each channel: a = exp(dt A), b = (a - 1) / A. A = -exp(log_A_re) +
    i A_im. A, dt, C and D are float32 whatever the precision of the rest, and a is float64. S4
    itself has a term of rank one more in A, and no positions either.

    Args:
        config: the model's, with the limits of dt at the start.
        layer_idx: which layer this is, counted from 0.
        modes: N, conjugate pairs counted once (the papers count both: their N is twice this).

    Raises:
        PHAError: modes that are no whole number of at least 1.
    """

    states = ("h",)
    float32 = ("log_A_re", "A_im", "log_dt", "C", "D")
    capped_rate = ("log_A_re", "A_im", "log_dt")

    def __init__(self, config: ArchitectureConfig, layer_idx: int, modes: int = 32) -> None:
        super().__init__(config, layer_idx)
        check_sizes("s4d", modes=modes)
        d = config.hidden_size
        self.dt_limits = config.dt_min, config.dt_max
        self.log_A_re = fp32(d, modes)
        self.A_im = fp32(d, modes)
        self.log_dt = fp32(d)
        self.C = fp32(d, modes, 2)
        self.D = fp32(d)
        self.W_o = nn.Linear(d, 2 * d)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """S4D-Lin: A = -1/2 + i pi n; dt log-uniform, C complex and D real normal; no b_o."""
        start_modes(self.log_A_re, self.A_im, self.log_dt, self.C, *self.dt_limits)
        nn.init.normal_(self.D)
        nn.init.zeros_(self.W_o.bias)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached state."""
        A, dt = continuous_modes(self.log_A_re, self.A_im, self.log_dt)
        Lambda = dt * A
        w = torch.view_as_complex(wide(self.C)) * Lambda.expm1() / A
        y, h = diagonal_ssm(
            *(z, Lambda.real, Lambda.imag, w.real, w.imag, self.D, self.past(context, "h")),
            *(context.document_starts, context.token_mask, context.cache is not None),
        )
        self.keep(context, h=h)
        return F.glu(self.W_o(F.gelu(y)), dim=-1)

    def flops(self, length: int) -> float:
        """Of the convolution; its kernel serves the whole batch."""
        return long_convolution_flops(self.D.numel(), length)

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """The decays of its modes."""
        A, dt = continuous_modes(self.log_A_re, self.A_im, self.log_dt)
        return Diagnostics(decays=(dt * A.real).exp().float())
