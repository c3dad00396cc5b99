"""The recurrent block of Griffin (De et al. 2024, arXiv 2402.19427), a gated linear recurrence.

With b = sqrt(1 - a^2) and its gate held constant this is Eq. 2's recurrence; here the input decides
how much is forgotten.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.mixers.common import fp32
from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import linear_scan, short_convolution
from pha.ops.precision import accumulation_type
from pha.utils.errors import PHAError

RATE = 8.0  # of the decay, at a gate that is fully open
TAPS = 4
LEAST = 1e-8  # of 1 - a^2, whose root has no derivative at 0


@register_branch("rg_lru")
class RGLRU(Branch):
    """A short convolution and a gated diagonal recurrence, beside a GELU gate.

    x = conv4(W_x z) + b,   r = sigmoid(W_r x + b_r),   i = sigmoid(W_i x + b_i)
    a = exp(-8 softplus(Lambda) r),   h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t
    out = W_o(h * GELU(W_g z))

    W_r and W_i are block-diagonal. a, and the parameters that make it up, are float32 whatever the
    precision of the rest.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        expansion: size n of the recurrence over d.
        blocks: how many blocks W_r and W_i have; if absent the number of query heads, or what it
            has in common with n.

    Raises:
        PHAError: blocks of unequal sizes.
    """

    in_pieces = True
    states = ("h", "conv")
    float32 = ("Lambda",)
    no_decay = ("taps",)
    capped_rate = ("Lambda",)
    unit_gain = ("W_g",)

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_idx: int,
        expansion: float = 1.0,
        blocks: int | None = None,
    ) -> None:
        super().__init__(config, layer_idx)
        d, n = config.hidden_size, config.ffn_size(expansion)
        blocks = math.gcd(n, config.num_attention_heads) if blocks is None else blocks
        if type(blocks) is not int or n < 1 or blocks < 1 or n % blocks:
            raise PHAError(
                f"model: blocks of branch rg_lru is {blocks!r}, and its size {n}; give a number "
                "that divides it"
            )
        self.W_x = nn.Linear(d, n, bias=False)
        self.W_g = nn.Linear(d, n, bias=False)
        self.W_o = nn.Linear(n, d, bias=False)
        self.taps = nn.Parameter(torch.empty(n, TAPS))
        self.W_r, self.W_i = (
            nn.Parameter(torch.empty(blocks, n // blocks, n // blocks)) for _ in range(2)
        )
        self.b, self.b_r, self.b_i = (nn.Parameter(torch.empty(n)) for _ in range(3))
        self.Lambda = fp32(n)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decays at an open gate uniform in [0.9, 0.999], weights of variance 1 / inputs."""
        with torch.no_grad():
            decay = torch.empty_like(self.Lambda).uniform_(0.9, 0.999)
            self.Lambda.copy_((-decay.log() / RATE).expm1().log())  # softplus undone
            self.taps.normal_(std=TAPS**-0.5)
            for weight in (self.W_r, self.W_i):
                weight.normal_(std=weight.shape[-1] ** -0.5)
            for bias in (self.b, self.b_r, self.b_i):
                bias.zero_()

    def decays_and_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """a, float32, and what enters the recurrence, in the type of x; (B, T, n) each."""
        blocks = x.unflatten(-1, (len(self.W_r), -1))
        dtype = accumulation_type(x)
        r, i = (
            (torch.einsum("btgi,gij->btgj", blocks, W).flatten(2) + b).to(dtype).sigmoid()
            for W, b in ((self.W_r, self.b_r), (self.W_i, self.b_i))
        )
        log_a = -RATE * F.softplus(self.Lambda.to(dtype)) * r
        scale = (-torch.expm1(2 * log_a)).clamp(min=LEAST).sqrt()
        return log_a.exp(), (scale * i * x).to(x.dtype)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached states."""
        flags, wanted = (context.document_starts, context.token_mask), context.cache is not None
        x, conv = short_convolution(
            *(self.W_x(z), self.taps, self.b, self.past(context, "conv"), *flags),
            last_state=wanted,
            pieces=context.pieces,
        )
        a, u = self.decays_and_inputs(x)
        h, last = linear_scan(
            u, a, self.past(context, "h"), *flags, last_state=wanted, pieces=context.pieces
        )
        self.keep(context, h=last, conv=conv)
        return self.W_o(h * F.gelu(self.W_g(z)))

    def flops(self, length: int) -> float:
        """Of the gates (nine a state) and the recurrence."""
        return 11.0 * self.Lambda.numel()

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """Its decays where the gate is open, the shortest memory it has."""
        return Diagnostics(decays=(-RATE * F.softplus(self.Lambda.float())).exp())
