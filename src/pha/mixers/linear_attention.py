"""Linear attention: Katharopoulos et al. (2020), and what others made of its feature map and rule.

Linear Transformer (2006.16236), Delta Network with DPFP (2102.11174), cosFormer (2202.08791),
Hedgehog (2402.04347).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.mixers.common import check_sizes
from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import linear_attention
from pha.ops.linear_attention.chunked import chunked_flops
from pha.ops.precision import accumulation_type
from pha.utils.errors import PHAError

FeatureMap = Literal["elu", "dpfp", "cosformer", "hedgehog"]


@register_branch("linear_attention")
class LinearAttention(Branch):
    """Attention whose weights are products of features, phi(q) . phi(k), so that it has a state.

    sum:    S_t = S_{t-1} + phi(k_t) v_t^T,   n_t = n_{t-1} + phi(k_t),
            y_t = S_t^T phi(q_t) / (n_t . phi(q_t) + 1e-5)
    delta:  S_t = S_{t-1} + beta_t phi(k_t) (v_t - S_{t-1}^T phi(k_t))^T,
            y_t = S_t^T phi(q_t) / sqrt(K),   beta = sigmoid(W_beta z),   phi normalised by `norm`

    with q, k, v = W z in heads of K = d / H entries, and no positions but cosFormer's. phi(x) is

    elu:        elu(x) + 1
    dpfp:       x' * roll(x', j) for j = 1..nu, with x' = [relu(x), relu(-x)]
    cosformer:  [relu(x) cos a, relu(x) sin a], a = pi i / (2 M) at position i, at most pi / 2; W
                have biases, and the normaliser is at least 1e-6
    hedgehog:   [softmax(W x + b), softmax(-W x - b)]; W and b of each head, of q and of k. The
                softmax over features is the stable form of exp

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        heads: H; as many as the model's attention has when absent.
        feature_map: phi.
        rule: `sum` or `delta`.
        norm: of the features under the delta rule, to a `sum` of one or to `l2` length one.
        nu: of dpfp.
        max_length: M of cosformer, the length that it is made for. Whatever is further from the
            beginning of its document counts as being there.

    Raises:
        PHAError: an option that there is not, or heads that do not divide d.
    """

    in_pieces = True
    states = ("S",)
    unit_gain = ("W_q", "W_k")

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_idx: int,
        heads: int | None = None,
        feature_map: FeatureMap = "elu",
        rule: Literal["sum", "delta"] = "sum",
        norm: Literal["sum", "l2"] = "sum",
        nu: int = 1,
        max_length: int = 1024,
    ) -> None:
        super().__init__(config, layer_idx)
        heads = config.num_attention_heads if heads is None else heads
        check_sizes("linear_attention", heads=heads, nu=nu, max_length=max_length)
        for name, value, known in (
            ("feature_map", feature_map, get_args(FeatureMap)),
            *(("rule", rule, ("sum", "delta")), ("norm", norm, ("sum", "l2"))),
        ):
            if value not in known:
                raise PHAError(
                    f"model: {name} of branch linear_attention is {value!r}; "
                    f"choose {' or '.join(known)}"
                )
        if norm == "l2" and rule == "sum":
            raise PHAError("model: norm l2 of branch linear_attention needs rule delta")
        d = config.hidden_size
        if d % heads:
            raise PHAError(
                f"model: heads of branch linear_attention is {heads}; it must divide {d}, "
                "the hidden_size"
            )
        self.heads, self.feature_map, self.delta, self.norm = (
            heads,
            feature_map,
            rule == "delta",
            norm,
        )
        self.nu, self.max_length = nu, max_length
        bias, K = feature_map == "cosformer", d // heads
        self.W_q = nn.Linear(d, d, bias=bias)
        self.W_k = nn.Linear(d, d, bias=bias)
        self.W_v = nn.Linear(d, d, bias=bias)
        self.W_o = nn.Linear(d, d, bias=bias)
        if self.delta:
            self.W_beta = nn.Linear(d, heads, bias=False)
        if feature_map == "hedgehog":
            self.map_q = nn.Parameter(torch.empty(heads, K, K))
            self.map_k = nn.Parameter(torch.empty(heads, K, K))
            self.map_bias_q = nn.Parameter(torch.empty(heads, K))
            self.map_bias_k = nn.Parameter(torch.empty(heads, K))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Biases of zero; Hedgehog's maps are the identity."""
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            elif name.startswith("map"):
                nn.init.zeros_(parameter).diagonal(dim1=-2, dim2=-1).fill_(1)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), starting from and updating the cached state."""
        q, k, v = (W(z).unflatten(-1, (self.heads, -1)) for W in (self.W_q, self.W_k, self.W_v))
        wide, K = accumulation_type(v), q.shape[-1]
        q, k = (self._features(x.to(wide), which, context) for x, which in ((q, "q"), (k, "k")))
        beta = None
        if self.delta:
            beta = self.W_beta(z).sigmoid()
            q, k = (self._normalised(x) for x in (q, k))
            q = q * K**-0.5
        else:
            v = F.pad(v, (0, 1), value=1.0)
        y, S = linear_attention(
            *(q, k, v.to(wide), None, beta, self.past(context, "S")),
            *(context.document_starts, context.token_mask, context.cache is not None),
            pieces=context.pieces,
        )
        self.keep(context, S=S)
        if not self.delta:
            y, weight = y.split([K, 1], -1)
            y = y / (weight.clamp(min=1e-6) if self.feature_map == "cosformer" else weight + 1e-5)
        return self.W_o(y.flatten(2).to(z.dtype))

    def _features(self, x: Tensor, which: str, context: Context) -> Tensor:
        """phi of the queries or the keys, (B, T, H, K)."""
        if self.feature_map == "elu":
            # Not F.elu, whose own backward pass fails compiled where gradients are strided.
            return x.relu() + x.clamp(max=0).exp()
        if self.feature_map == "dpfp":
            x = torch.cat([x.relu(), (-x).relu()], -1)
            return torch.cat([x * x.roll(j, -1) for j in range(1, self.nu + 1)], -1)
        if self.feature_map == "cosformer":
            position = context.positions.clamp(max=self.max_length).to(x.dtype)
            angle = (position * (math.pi / 2 / self.max_length))[..., None, None]
            return torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], -1)
        W, b = getattr(self, f"map_{which}"), getattr(self, f"map_bias_{which}")
        x = torch.einsum("bthk,hjk->bthj", x, W.to(x.dtype)) + b
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    def _normalised(self, x: Tensor) -> Tensor:
        """Features for the delta rule, which diverges without; all of zero stay so."""
        return F.normalize(x, p=2.0 if self.norm == "l2" else 1.0, dim=-1)  # none is below zero

    def flops(self, length: int) -> float:
        """Of the rule, with the features that there are."""
        H, P = self.heads, self.W_v.out_features // self.heads
        features = P * {"elu": 1, "dpfp": 2 * self.nu}.get(self.feature_map, 2)
        P += not self.delta  # the normaliser
        return chunked_flops(H, H, features, P, length, self.delta)

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """The strengths of the delta rule."""
        return Diagnostics(gates=self.W_beta(z).sigmoid() if self.delta else None)
