"""Hyena (Poli et al. 2023, arXiv 2302.10866): long convolutions whose filters a network makes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pha.mixers.common import check_sizes, fp32, start_as_torch_does
from pha.model.branches import Branch, Context, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import long_convolution, short_convolution
from pha.ops.long_convolution import long_convolution_flops
from pha.ops.precision import accumulation_type

TAPS = 3  # of the short convolution
BANDS = 16  # frequencies of a position
FREQUENCY = 14.0  # of the sines at the start
LEFT, FIRST, LAST = 0.01, 0.3, 1.5  # a window is down to 1% after 0.3 to 1.5 of the longest length


@register_branch("hyena")
class Hyena(Branch):
    """Products with gates and causal convolutions in turn; a filter is as long as the past may be.

    x_0, .., x_{R-1}, v = conv3(W_in z + b_in) + b
    v <- h_r conv (x_r * v) + s_r * x_r * v, for r = R-1 down to 1;   out = W_o (x_0 * v) + b_o

    h_r(t) = exp(-delta t / (M - 1)) (W_4 sin(f * (W_3 sin(f * (W_2 sin(f * (W_1 e_t + b_1)) ..,
    where e_t is t / (M - 1) with the cosines and sines of 16 frequencies (here fixed) and delta a
    rate of each channel, fixed too. The network is float32 whatever the precision of the rest.

    There is nothing in a filter behind M steps, and so nothing of an input that far back. It has
    no finite state but its last M - 1 inputs, which are what it keeps.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        order: R, one more than there are long convolutions.
        max_length: M, how many steps a filter has.
        filter_size: hidden size of the network.

    Raises:
        PHAError: an option that is no whole number of at least 1, or of at least 2 for the first
            two.
    """

    states = ("conv", "inputs")
    float32 = capped_rate = (
        *("filter_in", "filter_inner", "filter_biases", "filter_out"),
        "frequency",
    )

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_idx: int,
        order: int = 2,
        max_length: int = 1024,
        filter_size: int = 64,
    ) -> None:
        super().__init__(config, layer_idx)
        check_sizes("hyena", 2, order=order, max_length=max_length)
        check_sizes("hyena", filter_size=filter_size)
        d, filters = config.hidden_size, (order - 1) * config.hidden_size
        self.order, self.max_length = order, max_length
        self.initializer_range = config.initializer_range
        self.W_in, self.W_o = nn.Linear(d, (order + 1) * d), nn.Linear(d, d)
        self.conv_weight = nn.Parameter(torch.empty((order + 1) * d, 1, TAPS))
        self.conv_bias = nn.Parameter(torch.empty((order + 1) * d))
        self.skip = nn.Parameter(torch.empty(filters))
        self.filter_in = fp32(filter_size, 1 + 2 * BANDS)
        self.filter_inner = fp32(2, filter_size, filter_size)
        self.filter_biases = fp32(3, filter_size)
        self.filter_out = fp32(filters, filter_size)
        self.frequency = fp32(filter_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The network as linear layers of the model, s_r normal, a convolution of torch's."""
        for weight in (self.filter_in, self.filter_inner, self.filter_out):
            nn.init.normal_(weight, std=self.initializer_range)
        for bias in (self.filter_biases, self.W_in.bias, self.W_o.bias):
            nn.init.zeros_(bias)
        nn.init.constant_(self.frequency, FREQUENCY)
        for x in (self.conv_weight, self.conv_bias):
            start_as_torch_does(x, TAPS)
        nn.init.normal_(self.skip)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached inputs."""
        flags, wanted = (context.document_starts, context.token_mask), context.cache is not None
        x, conv = short_convolution(
            *(self.W_in(z), self.conv_weight.squeeze(1), self.conv_bias),
            *(self.past(context, "conv"), *flags),
            last_state=wanted,
        )
        *gates, v = x.chunk(self.order + 1, -1)
        kernels, past, kept = self.kernels(), self.past(context, "inputs"), []
        pasts = [None] * len(kernels) if past is None else past.chunk(len(kernels), -1)
        for gate, kernel, before in zip(reversed(gates[1:]), kernels, pasts, strict=True):
            v, last = long_convolution(gate * v, kernel, before, *flags, last_state=wanted)
            kept += [] if last is None else [last]
        self.keep(context, conv=conv, inputs=torch.cat(kept, -1) if kept else None)
        return self.W_o(gates[0] * v)

    def flops(self, length: int) -> float:
        """Of the convolutions and the gates; the filters serve the whole batch."""
        d = self.W_o.in_features
        long = (self.order - 1) * long_convolution_flops(d, min(length, self.max_length))
        return long + self.order * d

    def kernels(self) -> list[Tensor]:
        """Filters (M, d) in the order of their use, with s_r in the tap of the step itself."""
        M, dtype = self.max_length, accumulation_type(self.filter_in)
        step = torch.arange(M, device=self.filter_in.device, dtype=dtype)
        bands = torch.linspace(1e-4, BANDS - 1, BANDS, device=step.device, dtype=dtype)
        t, angle = step[:, None] / (M - 1), step[:, None] * (2 * math.pi / M) * bands
        x = torch.cat([t, angle.cos(), -angle.sin()], -1)
        channels = len(self.filter_out)
        rates = torch.linspace(1 / LAST, 1 / FIRST, channels, device=step.device, dtype=dtype)
        with torch.autocast(step.device.type, enabled=False):
            for W, b in zip((self.filter_in, *self.filter_inner), self.filter_biases, strict=True):
                x = (self.frequency * (x @ W.T + b)).sin()
            h = x @ self.filter_out.T * (math.log(LEFT) * t * rates).exp()
        h = torch.cat([h[:1] + self.skip, h[1:]])
        # Channels lie side by side, the filters of one together, so that all rates are in each r.
        return list(h.unflatten(-1, (-1, self.order - 1)).unbind(-1))
