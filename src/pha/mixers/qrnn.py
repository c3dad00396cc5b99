"""The quasi-recurrent layer of Bradbury et al. (2017, arXiv 1611.01576), the oldest of its kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import linear_scan, short_convolution
from pha.ops.precision import accumulation_type
from pha.utils.errors import PHAError


@register_branch("qrnn")
class QRNN(Branch):
    """A recurrence whose forgetting gate is of the input, and of the input before it.

    [x; f; o] = W z_t + V z_{t-1},   c_t = sigmoid(f) c_{t-1} + (1 - sigmoid(f)) tanh(x)
    out = W_o(sigmoid(o) * c_t)

    All have d entries.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        window: 2 with V or 1 without; if absent 2 in the first layer and 1 in the others.

    Raises:
        PHAError: another window.
    """

    in_pieces = True
    states = ("c", "before")

    def __init__(
        self, config: ArchitectureConfig, layer_idx: int, window: int | None = None
    ) -> None:
        super().__init__(config, layer_idx)
        window = (2 if layer_idx == 0 else 1) if window is None else window
        if window not in (1, 2):
            raise PHAError(f"model: window of branch qrnn is {window!r}; choose 1 or 2")
        d = config.hidden_size
        self.W = nn.Linear(d, 3 * d, bias=False)
        self.V = nn.Linear(d, 3 * d, bias=False) if window == 2 else None
        self.W_o = nn.Linear(d, d, bias=False)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached states."""
        flags, wanted = (context.document_starts, context.token_mask), context.cache is not None
        gates = self.W(z)
        if self.V is not None:
            taps = torch.eye(2, dtype=z.dtype, device=z.device)[0].expand(z.shape[-1], 2)
            before, last = short_convolution(
                *(z, taps, None, self.past(context, "before"), *flags),
                last_state=wanted,
                pieces=context.pieces,
            )
            gates = gates + self.V(before)
            self.keep(context, before=last)
        x, f, o = gates.chunk(3, -1)
        a = f.to(accumulation_type(f)).sigmoid()
        u = ((1 - a) * x.tanh()).to(x.dtype)
        c, last = linear_scan(
            u, a, self.past(context, "c"), *flags, last_state=wanted, pieces=context.pieces
        )
        self.keep(context, c=last)
        return self.W_o(o.sigmoid() * c)

    def flops(self, length: int) -> float:
        """Of gates (six a state) and the recurrence."""
        return 8.0 * self.W.in_features

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """Its forgetting gates, which are its decays, and its output gates, by z_t alone."""
        _, f, o = self.W(z).chunk(3, -1)
        return Diagnostics(decays=f.sigmoid(), gates=o.sigmoid())
