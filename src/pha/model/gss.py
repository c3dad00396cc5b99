"""The gated state space branch, Eq. 2 of the paper."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import gated_scan
from pha.ops.precision import accumulation_type

GROUP = 16  # states per HiPPO group: A = -(k + 1) for k = 0..15


@register_branch("gss")
class GatedStateSpace(Branch):
    """A linear recurrence whose input is gated by a sigmoid (Eq. 2).

    u_t = sigmoid(W_g z_t) * (W_B z_t)
    h_t = a * h_{t-1} + b * u_t,   a = exp(dt A) in (0, 1)^n, diagonal, constant in time
    y_t = W_C h_t

    A starts as the diagonal of HiPPO-LegS, -(k + 1) in every group of 16 states, and each group
    has a time step dt, log-uniform in [dt_min, dt_max] at the start. Both are learned in log
    space and in float32 whatever the precision of the rest. `input_scaling` chooses b:
    sqrt(1 - a^2) for `unit-variance`, 1 - a for `zero-order-hold`.
    """

    in_pieces = True
    states: ClassVar[tuple[str, ...]] = ("h",)
    float32 = capped_rate = ("log_A", "log_dt")
    unit_gain: ClassVar[tuple[str, ...]] = ("W_g",)

    def __init__(self, config: ArchitectureConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        d, n = config.hidden_size, config.state_size
        self.W_g = nn.Linear(d, n, bias=False)
        self.W_B = nn.Linear(d, n, bias=False)
        self.W_C = nn.Linear(n, d, bias=False)
        # Not in the default type, which loaders set to that of the other weights.
        self.log_A = nn.Parameter(torch.empty(n, dtype=torch.float32))
        self.log_dt = nn.Parameter(torch.empty(n // GROUP, dtype=torch.float32))
        self.input_scaling = config.input_scaling
        self.dt_range = (config.dt_min, config.dt_max)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """HiPPO diagonal and log-uniform time steps (the projections are initialised elsewhere)."""
        with torch.no_grad():
            k = torch.arange(self.log_A.numel(), device=self.log_A.device) % GROUP
            self.log_A.copy_(torch.log(k + 1.0))
            low, high = (math.log(dt) for dt in self.dt_range)
            self.log_dt.uniform_(low, high)

    def decay_and_scale(self, dt: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """a = exp(dt A) and b, each (n,); or (..., n) for time steps (..., n / 16) of its own."""
        if dt is None:
            dt = self.log_dt.to(accumulation_type(self.log_dt)).exp()
        dt_A = -dt.repeat_interleave(GROUP, -1) * self.log_A.to(dt.dtype).exp()
        a = dt_A.exp()
        # expm1 keeps the precision of 1 - a and 1 - a^2 where a is close to 1.
        if self.input_scaling == "zero-order-hold":
            return a, -torch.expm1(dt_A)
        return a, (-torch.expm1(2 * dt_A)).sqrt()

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached state."""
        a, b = self.decay_and_scale()
        h, h_last = gated_scan(
            *(self.W_g(z), self.W_B(z), a, b),
            *(self.past(context, "h"), context.document_starts, context.token_mask),
            last_state=context.cache is not None,
            pieces=context.pieces,
        )
        self.keep(context, h=h_last)
        return self.W_C(h)

    def flops(self, length: int) -> float:
        """A sigmoid, gating, scaling, and a step of the recurrence for each state."""
        return 5.0 * self.log_A.numel()

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """Its decays and its gates."""
        return Diagnostics(decays=self.decay_and_scale()[0], gates=self.W_g(z).sigmoid())
