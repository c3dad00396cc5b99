"""The selective state space layer of Mamba (Gu and Dao 2023, arXiv 2312.00752)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import selective_scan, short_convolution
from pha.ops.precision import accumulation_type
from pha.utils.errors import PHAError

TAPS = 4
SHORTEST, LONGEST, LEAST = 1e-3, 1e-1, 1e-4  # time steps at the start


@register_branch("mamba")
class Mamba(Branch):
    """N states a channel, whose time step, input and output weights are of the input.

    [x; g] = W_in z,   x = SiLU(conv4(x) + b),   [r; B; C] = W_x x,   dt = softplus(W_dt r + b_dt)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = C_t h_t + D x_t,   out = W_o(y * SiLU(g))

    A = -exp(log_A), D and b_dt are float32 whatever the precision of the rest.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        expansion: number n of channels over d.
        modes: N.

    Raises:
        PHAError: an option that is no size.
    """

    states = ("h", "conv")
    float32 = ("log_A", "skip", "b_dt")
    no_decay = ("log_A", "taps")
    unit_gain = ("W_dt",)

    def __init__(
        self, config: ArchitectureConfig, layer_idx: int, expansion: float = 2.0, modes: int = 16
    ) -> None:
        super().__init__(config, layer_idx)
        d, n = config.hidden_size, config.ffn_size(expansion)
        if not isinstance(modes, int) or modes < 1 or n < 1:
            raise PHAError(f"model: branch mamba has {n} channels and modes {modes!r}; at least 1")
        self.rank, self.modes = math.ceil(d / 16), modes
        self.W_in = nn.Linear(d, 2 * n, bias=False)
        self.W_x = nn.Linear(n, self.rank + 2 * modes, bias=False)
        self.W_dt = nn.Linear(self.rank, n, bias=False)
        self.W_o = nn.Linear(n, d, bias=False)
        self.taps = nn.Parameter(torch.empty(n, TAPS))
        self.b = nn.Parameter(torch.empty(n))
        # Not in the default type, which loaders set to that of the other weights.
        self.log_A = nn.Parameter(torch.empty(n, modes, dtype=torch.float32))
        self.skip = nn.Parameter(torch.empty(n, dtype=torch.float32))
        self.b_dt = nn.Parameter(torch.empty(n, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -1 .. -N, D = 1, time steps log-uniform in [0.001, 0.1], uniform W_dt and taps."""
        with torch.no_grad():
            self.log_A.copy_(torch.arange(1.0, self.modes + 1).log())
            self.skip.fill_(1.0)
            dt = torch.empty_like(self.b_dt).uniform_(math.log(SHORTEST), math.log(LONGEST)).exp()
            self.b_dt.copy_(dt.clamp(min=LEAST).expm1().log())  # softplus undone
            for weight, bound in (
                (self.W_dt.weight, self.rank**-0.5),
                *((x, TAPS**-0.5) for x in (self.taps, self.b)),
            ):
                weight.uniform_(-bound, bound)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached states."""
        flags, wanted = (context.document_starts, context.token_mask), context.cache is not None
        x, gate = self.W_in(z).chunk(2, -1)
        x, conv = short_convolution(
            *(x, self.taps, self.b, self.past(context, "conv"), *flags), last_state=wanted
        )
        x = F.silu(x)
        low, B, C = self.W_x(x).split([self.rank, self.modes, self.modes], -1)
        dtype = accumulation_type(x)
        dt = F.softplus(self.W_dt(low).to(dtype) + self.b_dt.to(dtype))
        A = -self.log_A.to(dtype).exp()
        y, last = selective_scan(
            *(x, dt, A, B, C, self.past(context, "h"), *flags), last_state=wanted
        )
        self.keep(context, h=last, conv=conv)
        return self.W_o((y + self.skip * x).to(x.dtype) * F.silu(gate))

    def flops(self, length: int) -> float:
        """Seven a mode: its decay, its input, a step and the output."""
        return 7.0 * self.log_A.numel()

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """Its decays at the time steps of a low-rank input of zero."""
        dt = F.softplus(self.b_dt.float()).unsqueeze(-1)
        return Diagnostics(decays=(-dt * self.log_A.float().exp()).exp())
