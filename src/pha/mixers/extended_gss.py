"""Eq. 2 of the paper with what other state spaces have beside it, each by a switch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.model.branches import Context, register_branch
from pha.model.config import ArchitectureConfig
from pha.model.gss import GROUP, GatedStateSpace
from pha.ops import gated_scan, linear_scan, short_convolution
from pha.ops.precision import accumulation_type
from pha.utils.errors import PHAError

TAPS = 4


@register_branch("extended_gss")
class ExtendedGSS(GatedStateSpace):
    """Eq. 2, of which an output gate, a short convolution and a time step from the input are parts.

    v = W_B z, or conv4(W_B z) + c with `convolution`
    u_t = sigmoid(W_g z_t) * v_t
    h_t = a_t * h_{t-1} + b_t * u_t,   a_t = exp(dt_t A)
    dt_t = dt, or softplus(W_dt z_t + softplus^-1(dt)) with `input_dt`, one for each group of states
    y_t = W_C h_t, or W_C(h_t * SiLU(W_o z_t)) with `output_gate`

    All else is that of `GatedStateSpace`. An output gate adds a third of its weights, a time step
    from the input a sixteenth of a projection.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        output_gate: whether the states are gated when they are read.
        convolution: whether the inputs are convolved over four steps before they are gated.
        input_dt: whether the input decides how much is forgotten.

    Raises:
        PHAError: a switch that is neither true nor false.
    """

    states = ("h", "conv")
    no_decay = ("taps",)
    unit_gain = ("W_g", "W_o")

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_idx: int,
        output_gate: bool = False,
        convolution: bool = False,
        input_dt: bool = False,
    ) -> None:
        switches = {"output_gate": output_gate, "convolution": convolution, "input_dt": input_dt}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise PHAError(f"model: {name} of branch extended_gss is {value!r}; true or false")
        self.output_gate, self.convolution, self.input_dt = output_gate, convolution, input_dt
        super().__init__(config, layer_idx)
        d, n = config.hidden_size, config.state_size
        if output_gate:
            self.W_o = nn.Linear(d, n, bias=False)
        if input_dt:
            self.W_dt = nn.Linear(d, n // GROUP, bias=False)
        if convolution:
            self.taps = nn.Parameter(torch.empty(n, TAPS))
            self.c = nn.Parameter(torch.empty(n))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in Eq. 2; taps of variance 1 / taps and no bias."""
        super().reset_parameters()
        if hasattr(self, "taps"):  # not yet where that of Eq. 2 is constructed
            nn.init.normal_(self.taps, std=TAPS**-0.5)
            nn.init.zeros_(self.c)

    def decays_of(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t, each (B, T, n), in at least float32."""
        return self.decay_and_scale(
            F.softplus(self.W_dt(z).to(accumulation_type(z)) + self.dt_offset())
        )

    def dt_offset(self) -> Tensor:
        """(n / 16,) what a time step is before softplus where the input says nothing."""
        dt = self.log_dt.to(accumulation_type(self.log_dt)).exp()
        return dt + torch.log(-torch.expm1(-dt))  # log(exp(dt) - 1)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached states."""
        flags, wanted = (context.document_starts, context.token_mask), context.cache is not None
        v = self.W_B(z)
        if self.convolution:
            v, conv = short_convolution(
                *(v, self.taps, self.c, self.past(context, "conv"), *flags),
                last_state=wanted,
                pieces=context.pieces,
            )
            self.keep(context, conv=conv)
        past, g = self.past(context, "h"), self.W_g(z)
        if self.input_dt:
            a, b = self.decays_of(z)
            u = (g.to(b.dtype).sigmoid() * v * b).to(v.dtype)
            h, last = linear_scan(u, a, past, *flags, last_state=wanted, pieces=context.pieces)
        else:
            a, b = self.decay_and_scale()
            h, last = gated_scan(g, v, a, b, past, *flags, last_state=wanted, pieces=context.pieces)
        self.keep(context, h=last)
        return self.W_C(h * F.silu(self.W_o(z)) if self.output_gate else h)

    def flops(self, length: int) -> float:
        """Those of Eq. 2, and three a state for a gate, eight for taps, four for its decay."""
        added = 3 * self.output_gate + 2 * TAPS * self.convolution + 4 * self.input_dt
        return super().flops(length) + added * self.log_A.numel()
