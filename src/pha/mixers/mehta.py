"""The gated state space layer of Mehta et al. (2022, arXiv 2206.13947), a branch beside Eq. 2's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.mixers.common import check_sizes, fp32
from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import dss
from pha.ops.long_convolution import long_convolution_flops
from pha.utils.errors import PHAError


@register_branch("mehta_gss")
class MehtaGSS(Branch):
    """A diagonal state space on few channels, gated by a wide projection of the input.

    u = GELU(W_u z),   v = GELU(W_v z),   y = DSS(v),   out = W_o((W_y y) * u)

    u has `expansion` times d entries, v and y have H = `channels`. The state space has N = `modes`
    complex modes that all channels share (`pha.ops.dss`): Lambda is N complex numbers, C is H x N
    complex, D is H real. They are float32 whatever the precision of the rest.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        channels: H.
        modes: N.
        expansion: size of the gate over d.

    Raises:
        PHAError: an option of the wrong kind or below 1.
    """

    states = ("h",)
    float32 = ("Lambda_re", "Lambda_im", "C_re", "C_im", "D")
    no_decay = ("C_re", "C_im")
    capped_rate = ("Lambda_re", "Lambda_im")

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_idx: int,
        channels: int = 256,
        modes: int = 512,
        expansion: float = 4,
    ) -> None:
        super().__init__(config, layer_idx)
        check_sizes("mehta_gss", channels=channels, modes=modes)
        d, inner = config.hidden_size, config.ffn_size(expansion)
        if expansion < 1:
            raise PHAError(f"model: expansion of branch mehta_gss is {expansion}; at least 1")
        self.W_u = nn.Linear(d, inner, bias=False)
        self.W_v = nn.Linear(d, channels, bias=False)
        self.W_y = nn.Linear(channels, inner, bias=False)
        self.W_o = nn.Linear(inner, d, bias=False)
        self.Lambda_re = fp32(modes)
        self.Lambda_im = fp32(modes)
        self.C_re = fp32(channels, modes)
        self.C_im = fp32(channels, modes)
        self.D = fp32(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal throughout: Lambda's logarithms, C and D [ours].

        Modes then forget within a fraction of a token to some twenty, at frequencies of up to
        several turns; longer memories are learned.
        """
        with torch.no_grad():
            for parameter in (self.Lambda_re, self.Lambda_im, self.C_re, self.C_im, self.D):
                parameter.normal_()

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached state."""
        u, v = F.gelu(self.W_u(z)), F.gelu(self.W_v(z))
        h0 = self.past(context, "h")
        parameters = self.Lambda_re, self.Lambda_im, self.C_re, self.C_im, self.D
        flags = context.document_starts, context.token_mask
        y, h_last = dss(v, *parameters, h0, *flags, last_state=context.cache is not None)
        self.keep(context, h=h_last)
        return self.W_o(self.W_y(y) * u)

    def flops(self, length: int) -> float:
        """Of the convolution; its kernel serves the whole batch."""
        return long_convolution_flops(self.D.numel(), length)

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """The decays of its modes."""
        return Diagnostics(decays=(-self.Lambda_re.float().exp()).exp())
