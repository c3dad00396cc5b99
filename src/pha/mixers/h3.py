"""H3 (Fu et al. 2022, arXiv 2212.14052): two state spaces in the place of attention's products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pha.mixers.common import check_sizes, continuous_modes, fp32, start_as_torch_does, start_modes
from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import diagonal_ssm, short_convolution
from pha.ops.long_convolution import long_convolution_flops
from pha.ops.precision import accumulation_type, wide

TAPS = 64  # of the shift


@register_branch("h3")
class H3(Branch):
    """Keys shifted by one state space meet values, another remembers, and queries pick.

    q, k, v = W z + b,   k'_t = sum_l F_l k_{t-l} + D_k k_t,   F_l = sum_n B_n C_{n+l}, l < 64
    y = q * SSM(k' * v),   out = W_o y + b_o

    all products elementwise. The shift has real B and C of its own. SSM is a diagonal state space
    like that of S4D, with B learned too and the bilinear rule a = (1 + dt A / 2) / (1 - dt A / 2),
    b = dt B / (1 - dt A / 2). What the two are made of is float32 whatever the rest is in.

    Args:
        config: the model's, with the limits of dt at the start.
        layer_idx: which layer this is, counted from 0.
        modes: of SSM in each channel, conjugate pairs counted once (the paper counts both: 64).

    Raises:
        PHAError: modes that are no whole number of at least 1.
    """

    states = ("h", "keys")
    float32 = ("log_A_re", "A_im", "log_dt", "B", "C", "D", "shift_B", "shift_C", "D_k")
    capped_rate = ("log_A_re", "A_im", "log_dt", "B", "shift_B")
    unit_gain = ("W_q", "W_k")

    def __init__(self, config: ArchitectureConfig, layer_idx: int, modes: int = 32) -> None:
        super().__init__(config, layer_idx)
        check_sizes("h3", modes=modes)
        d = config.hidden_size
        self.dt_limits = config.dt_min, config.dt_max
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(d, d) for _ in range(4))
        self.shift_B, self.shift_C, self.D_k = fp32(d, TAPS), fp32(d, 1, TAPS), fp32(d)
        self.log_A_re, self.A_im, self.log_dt = fp32(d, modes), fp32(d, modes), fp32(d)
        self.B, self.C, self.D = fp32(d, modes, 2), fp32(d, modes, 2), fp32(d)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """S4D-Lin with B = 1, a shift of uniform taps, D and D_k normal, biases of zero."""
        start_modes(self.log_A_re, self.A_im, self.log_dt, self.C, *self.dt_limits)
        self.B.copy_(torch.tensor([1.0, 0.0]))
        nn.init.zeros_(self.shift_B)[:, 0] = 1
        start_as_torch_does(self.shift_C, TAPS)
        for D in (self.D, self.D_k):
            nn.init.normal_(D)
        for layer in (self.W_q, self.W_k, self.W_v, self.W_o):
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached states."""
        flags, wanted = (context.document_starts, context.token_mask), context.cache is not None
        q, k, v = self.W_q(z), self.W_k(z), self.W_v(z)
        k, keys = short_convolution(
            *(k, self._taps(), None, self.past(context, "keys"), *flags), last_state=wanted
        )
        Lambda, b = self._discrete()
        w = torch.view_as_complex(wide(self.C)) * b
        y, h = diagonal_ssm(
            *(k * v, Lambda.real, Lambda.imag, w.real, w.imag, self.D, self.past(context, "h")),
            *(*flags, wanted),
        )
        self.keep(context, h=h, keys=keys)
        return self.W_o(q * y)

    def _taps(self) -> Tensor:
        """F, with D_k in F_0, as taps (d, 64) of which the last is the step's own."""
        dtype = accumulation_type(self.shift_B)
        B, C = (
            torch.fft.rfft(x.to(dtype), 2 * TAPS) for x in (self.shift_B, self.shift_C.squeeze(1))
        )
        taps = torch.fft.irfft(B.conj() * C, 2 * TAPS)[:, :TAPS]
        own = taps[:, :1] + self.D_k.to(dtype).unsqueeze(-1)
        return torch.cat([own, taps[:, 1:]], 1).flip(1)

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """The logarithms of a, and b: (d, N) complex128 each."""
        A, dt = continuous_modes(self.log_A_re, self.A_im, self.log_dt)
        half = dt * A / 2
        b = dt * torch.view_as_complex(wide(self.B)) / (1 - half)
        # log((1 + half) / (1 - half)) in real numbers, at a third of the time.
        x, y = half.real, half.imag
        gain = (((1 + x).square() + y.square()) / ((1 - x).square() + y.square())).log() / 2
        return torch.complex(gain, torch.atan2(y, 1 + x) + torch.atan2(y, 1 - x)), b

    def flops(self, length: int) -> float:
        """Of the long convolution and two products."""
        return 2.0 * self.D.numel() + long_convolution_flops(self.D.numel(), length)

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """The decays of its modes."""
        return Diagnostics(decays=self._discrete()[0].real.exp().float())
