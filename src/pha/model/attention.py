"""The attention branch: grouped queries, rotary or other positions, scaled-cosine logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pha.model.branches import Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import attention, rotate, unit_rotary
from pha.ops.attention import causal_pairs, keys_seen
from pha.ops.attention.distances import (
    alibi_slopes,
    key_with_positions,
    query_with_slopes,
    value_as_wide,
)
from pha.ops.attention.naive import attention_weights
from pha.utils.errors import PHAError

POSITIONS = ("rotary", "alibi", "none")
MAX_LOG_SCALE = math.log(100.0)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles p * theta^(-2 i / K) of the rotary embedding.

    Args:
        positions: (..., T) token positions.
        head_dim: K, even.
        theta: the base.

    Returns:
        Two tensors (..., T, K / 2), float32. The angles are float64: in float32 one of a million
        is off by 0.03.
    """
    place = positions.device if positions.device.type != "mps" else "cpu"  # MPS has no float64
    i = torch.arange(0, head_dim, 2, device=place, dtype=torch.float64)
    angles = positions.to(place, torch.float64).unsqueeze(-1) * theta ** (-i / head_dim)
    cos, sin = (x.to(positions.device, torch.float32) for x in (angles.cos(), angles.sin()))
    return cos, sin


@register_branch("attention")
class GroupedQueryAttention(Branch):
    """Causal GQA with RoPE; logits are cosines times a learnable per-head temperature.

    q and k are L2-normalised per head and the logits multiplied by exp(min(s, ln 100)), with
    s = ln 10 at the start: scaled-cosine attention without 1 / sqrt(K) and without relative bias.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        positions: `rotary`, `alibi` (with logits of dot products) or `none`.
        window: how many keys a query of this branch sees, its own included; None is all that the
            model's `attention_window` lets it. Keys behind it are dropped where every layer with
            attention has a window, and the widest of these is kept.
        theta: base of this branch's rotary embedding; None is the model's `rope_theta`.
        length_scaling: T of training: a query that sees n > T keys multiplies its cosines by
            tau + ln(n / T), so that one match among n keys keeps its weight; None: by tau always.

    Raises:
        PHAError: other positions, a window below 2, a base or a length that is none, or a scaling
            with logits of dot products, which have no temperature.
    """

    in_pieces = keeps_keys = True
    float32 = ("logit_scale",)
    unit_gain = ("W_q", "W_k")

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_idx: int,
        positions: str = "rotary",
        window: int | None = None,
        theta: float | None = None,
        length_scaling: int | None = None,
    ) -> None:
        super().__init__(config, layer_idx)
        if positions not in POSITIONS:
            raise PHAError(
                f"model: positions of branch attention are {positions!r}; choose "
                f"{' or '.join(POSITIONS)}"
            )
        if positions == "alibi" and config.attention_logits != "dot-product":
            raise PHAError("model: positions alibi need attention_logits dot-product; set it")
        for name, value in (("window", window), ("length_scaling", length_scaling)):
            if value is not None and (type(value) is not int or value < 2):
                raise PHAError(f"model: {name} of branch attention is {value!r}; at least 2")
        if theta is not None and not (type(theta) in (int, float) and 0 < theta < math.inf):
            raise PHAError(f"model: theta of branch attention is {theta!r}; a number above 0")
        if length_scaling is not None and config.attention_logits != "scaled-cosine":
            raise PHAError("model: length_scaling needs attention_logits scaled-cosine; set it")
        self.positions, self.window = positions, window
        self.theta, self.length_scaling = theta, length_scaling
        self.windows = [w for w in (window, config.attention_window) if w is not None]
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.cosine = config.attention_logits == "scaled-cosine"
        d = config.hidden_size
        self.W_q = nn.Linear(d, self.heads * self.head_dim, bias=False)
        self.W_k = nn.Linear(d, self.kv_heads * self.head_dim, bias=False)
        self.W_v = nn.Linear(d, self.kv_heads * self.head_dim, bias=False)
        self.W_o = nn.Linear(self.heads * self.head_dim, d, bias=False)
        if self.cosine:
            self.logit_scale = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Temperature 10 for every head (the projections are initialised elsewhere)."""
        if self.cosine:
            nn.init.constant_(self.logit_scale, math.log(10.0))

    def temperatures(self) -> Tensor:
        """What the cosines of each head are multiplied by, (H,) float32."""
        return self.logit_scale.float().clamp(max=MAX_LOG_SCALE).exp()

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), attending to cached positions as well."""
        B, T, _ = z.shape
        q, k, v = (
            W(z).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for W in (self.W_q, self.W_k, self.W_v)
        )
        rotary = context.rotary
        if self.positions != "rotary":  # turned by nothing
            rotary = torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        elif self.theta is not None:
            rotary = rotary_angles(context.positions, self.head_dim, self.theta)
        if self.cosine:
            scale = self.temperatures()
            q, k = (unit_rotary(x, s, *rotary) for x, s in ((q, scale), (k, None)))
        else:
            q = rotate(q.float() / math.sqrt(self.head_dim), *rotary)
            k = rotate(k.float(), *rotary)
        k = k.to(v.dtype)
        if self.positions == "alibi":
            k = key_with_positions(k, context.positions)
        if context.cache is not None:
            k, v = context.cache.update(k, v)
        seen = context.seen(k.shape[2], self.window)
        if self.length_scaling is not None:
            n = keys_seen(T, k.shape[2], *seen, device=k.device)
            q = q * (1 + (n / self.length_scaling).log().clamp(min=0) / scale[:, None, None])
        q = q.to(v.dtype)
        if self.positions == "alibi":
            q = query_with_slopes(q, alibi_slopes(self.heads))
        if context.attention_weights is not None:
            context.attention_weights.append(attention_weights(q, k, *seen))
        if self.positions == "alibi":
            v = value_as_wide(v)
        y = attention(q, k, v, *seen, backend=context.attention_backend)[..., : self.head_dim]
        return self.W_o(y.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))

    def flops(self, length: int) -> float:
        """Of q k^T and its product with v, over the pairs that mask and windows leave."""
        pairs = causal_pairs(length, min([length, *self.windows]))
        return 4.0 * self.heads * self.head_dim * pairs / length

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """The temperatures of its heads, where the logits have any."""
        if not self.cosine:
            return Diagnostics()
        limit = math.exp(MAX_LOG_SCALE)
        return Diagnostics(temperatures=self.temperatures(), temperature_limit=limit)
