"""The selective state space layer of Mamba (Gu and Dao 2023, arXiv 2312.00752)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.mixers.common import check_sizes, fp32, start_as_torch_does, start_time_steps
from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import selective_scan, short_convolution
from pha.ops.precision import accumulation_type

TAPS = 4


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

    def __init__(
        self, config: ArchitectureConfig, layer_idx: int, expansion: float = 2.0, modes: int = 16
    ) -> None:
        super().__init__(config, layer_idx)
        d, n = config.hidden_size, config.ffn_size(expansion)
        check_sizes("mamba", modes=modes, channels=n)
        self.rank, self.modes = math.ceil(d / 16), modes
        self.W_in = nn.Linear(d, 2 * n, bias=False)
        self.W_x = nn.Linear(n, self.rank + 2 * modes, bias=False)
        self.W_dt = nn.Linear(self.rank, n, bias=False)
        self.W_o = nn.Linear(n, d, bias=False)
        self.taps = nn.Parameter(torch.empty(n, TAPS))
        self.b = nn.Parameter(torch.empty(n))
        self.log_A = fp32(n, modes)
        self.skip = fp32(n)
        self.b_dt = fp32(n)
        # Residual layers of the model, among which the authors share out the output's scale.
        self.depth = config.num_hidden_layers * (2 if config.primary_ffn_expansion else 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors do: A = -1 .. -N, D one, dt log-uniform, torch's linear layers."""
        self.log_A.copy_(torch.arange(1.0, self.modes + 1).log())
        nn.init.ones_(self.skip)
        start_time_steps(self.b_dt)
        for x in (self.taps, self.b):
            start_as_torch_does(x, TAPS)
        for layer in (self.W_in, self.W_x, self.W_dt):
            start_as_torch_does(layer.weight, layer.in_features)
        start_as_torch_does(self.W_o.weight, self.W_o.in_features * self.depth)

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
