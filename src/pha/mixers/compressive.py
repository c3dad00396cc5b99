"""Attention with the memory of the Compressive Transformer (Rae et al. 2020, arXiv 1911.05507)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.mixers.common import check_sizes
from pha.model.attention import GroupedQueryAttention, rotary_angles
from pha.model.branches import Context, register_branch
from pha.model.config import ArchitectureConfig
from pha.ops import attention, rotate, unit_rotary
from pha.ops.attention import causal_pairs
from pha.ops.attention.naive import attention_weights
from pha.utils.errors import PHAError

POOLING = ("convolution", "mean", "max")


@register_branch("compressive_attention")
class CompressiveAttention(GroupedQueryAttention):
    """Attention to the last w inputs as they were, and to c at a time of those before them.

    Inputs number g c to g c + c - 1 of a document are pooled into one, which is a key and a value
    like any other, at the middle of their positions. A query at p sees inputs behind p - w and, of
    the pooled ones, the last `slots` that begin at p - w or before. What is pooled has no gradient
    but that of the projections. As in the paper, kept are inputs, not keys.

    A convolution, y = W_c [z_gc; ..; z_gc+c-1], learns from a loss of its own: how far attention of
    the inputs, by content alone, to what is pooled now comes from attention to it as it was. Its
    gradient goes to W_c and nowhere else, and no other goes there. We take the mean square.

    The paper's windows move by a segment at a time, ours by a token: any split of a sequence
    gives the same. Its relative positions are rotary here.

    Args:
        config: the model's.
        layer_idx: which layer this is, counted from 0.
        window: w; None is the model's `attention_window`.
        slots: how many pooled inputs are seen.
        rate: c.
        pooling: `convolution`, `mean` or `max`.

    Raises:
        PHAError: no window or one below the rate, another pooling, or no whole number of slots.
    """

    in_pieces = keeps_keys = False
    states = ("inputs", "places", "slots", "slot_places")

    def __init__(
        self,
        config: ArchitectureConfig,
        layer_idx: int,
        window: int | None = None,
        slots: int = 512,
        rate: int = 4,
        pooling: Literal["convolution", "mean", "max"] = "convolution",
    ) -> None:
        super().__init__(config, layer_idx, window=window)
        check_sizes("compressive_attention", slots=slots, rate=rate)
        if pooling not in POOLING:
            raise PHAError(
                f"model: pooling of branch compressive_attention is {pooling!r}; choose "
                f"{' or '.join(POOLING)}"
            )
        if not self.windows or min(self.windows) < rate:
            raise PHAError(
                f"model: branch compressive_attention has windows {self.windows}; it needs one of "
                f"at least its rate, {rate}: set attention_window or its own"
            )
        self.reach, self.slots, self.rate, self.pooling = min(self.windows), slots, rate, pooling
        if pooling == "convolution":
            self.W_c = nn.Linear(rate * config.hidden_size, config.hidden_size, bias=False)
        self.rope_theta = config.rope_theta
        # Of those pooled, any query still to come may see so many, or finds them in its window.
        self.kept = slots + self.reach // rate + 2

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d), attending to and updating what is kept."""
        B, T, _ = z.shape
        if T == 0:
            return z
        w, c = self.reach, self.rate
        x, at, slots, slots_at = self._past(z, context)
        # Places in the document from 1, 0 where there is nothing; which document, the past's is 0.
        here = context.positions.expand(B, T).float() + 1
        document = torch.zeros_like(here)
        if context.document_starts is not None:
            document = context.document_starts.cumsum(1).float()
        count = torch.full((B, 1), T, device=z.device)
        if context.token_mask is not None:
            here = torch.where(context.token_mask, here, 0)
            count = context.token_mask.sum(1, keepdim=True)
        x, at = torch.cat([x.to(z.dtype), z], 1), torch.cat([at, here], 1)
        of = F.pad(document, (w - 1, 0))
        if context.token_mask is not None:
            x, at, of = _last(at > 0, x.shape[1], x, at, of)

        is_new = torch.arange(x.shape[1], device=z.device) >= x.shape[1] - count
        groups, pooled_at, pooled_of = self._groups(x.detach(), at, of, is_new)
        pooled = self._pooled(groups)
        if self.pooling == "convolution" and context.own_losses is not None:
            lost = self._lost(z.detach(), groups, pooled, pooled_at > 0)
            context.own_losses.append((lost * (here > 0)).sum())
        slots = torch.cat([slots.to(z.dtype), pooled.detach().to(z.dtype)], 1)
        slots_at = torch.cat([slots_at, pooled_at], 1)
        slots_of = F.pad(pooled_of, (slots_at.shape[1] - pooled_of.shape[1], 0))

        y = self._attend(
            z,
            torch.cat([slots, x], 1),
            torch.cat([slots_at - (c - 1) / 2, at], 1) - 1,
            torch.cat(
                [
                    self._sees_slots(here, slots_at) & _same(document, slots_of),
                    (at[:, None] > here[..., None] - w)
                    & (at[:, None] <= here[..., None])
                    & (at > 0)[:, None]
                    & _same(document, of),
                ],
                2,
            ),
            context,
        )
        at = torch.where(of == document[:, -1:], at, 0)
        slots_at = torch.where(slots_of == document[:, -1:], slots_at, 0)
        x, at = x[:, 1 - w :], at[:, 1 - w :]
        slots, slots_at = _last(slots_at > 0, self.kept, slots, slots_at)
        self.keep(context, inputs=x, places=at, slots=slots, slot_places=slots_at)
        return y

    def _past(self, z: Tensor, context: Context) -> tuple[Tensor, ...]:
        """The last w - 1 inputs and their places, those pooled and the places of their ends."""
        rows, d = (self.reach - 1, self.kept), z.shape[2]
        shapes = [shape for n in rows for shape in ((n, d), (n,))]
        past = [self.past(context, name) for name in self.states]
        return tuple(
            z.new_zeros(len(z), *shape, dtype=torch.float32) if x is None else x
            for x, shape in zip(past, shapes, strict=True)
        )

    def _groups(self, x: Tensor, at: Tensor, of: Tensor, is_new: Tensor) -> tuple[Tensor, ...]:
        """What the new inputs complete, (B, S, c, d), the places of its ends, its documents.

        A place is 0 where there is nothing, or a group begins before what was read of its document.
        """
        c, many = self.rate, -(-(x.shape[1] - self.reach + 1) // self.rate)
        ends = is_new & (at % c == 0)
        places = torch.arange(x.shape[1], device=x.device).expand_as(at)
        is_end, last, end_at, end_of = _last(ends, many, ends, places, at, of)
        inside = (last[..., None] + torch.arange(1 - c, 1, device=x.device)).clamp(min=0)
        first = inside[..., 0]
        is_whole = at.take_along_dim(first, 1) == end_at - c + 1
        is_whole &= of.take_along_dim(first, 1) == end_of
        groups = x.take_along_dim(inside.flatten(1)[..., None], 1).unflatten(1, inside.shape[1:])
        return groups, torch.where(is_end & is_whole, end_at, 0), end_of

    def _pooled(self, groups: Tensor) -> Tensor:
        """One input (B, S, d) for each group (B, S, c, d)."""
        if self.pooling == "convolution":
            pooled: Tensor = self.W_c(groups.flatten(2))
            return pooled
        return groups.mean(2) if self.pooling == "mean" else groups.amax(2)

    def _lost(self, z: Tensor, groups: Tensor, pooled: Tensor, real: Tensor) -> Tensor:
        """How far attention of z (B, T, d) to what is pooled is from that to groups (B, S, c, d).

        The mean square over the heads' values, (B, T); 0 in a row without `real` groups.
        """
        some = real.any(1)[:, None]
        real = real | ~some  # a softmax over nothing is not a number
        whole = self._by_content(z, groups.flatten(1, 2), real.repeat_interleave(self.rate, 1))
        short = self._by_content(z, pooled.to(z.dtype), real)
        return (whole - short).float().square().mean((1, 3)) * some

    def _by_content(self, z: Tensor, inputs: Tensor, real: Tensor) -> Tensor:
        """Attention (B, H, T, K) of z to inputs (B, S, d), wherever they are, by fixed weights."""
        q, k, v = (
            F.linear(x, W.weight.detach()).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for W, x in ((self.W_q, z), (self.W_k, inputs), (self.W_v, inputs))
        )
        if self.cosine:
            scale = self.temperatures().detach()
            q, k = F.normalize(q, dim=-1) * scale[:, None, None], F.normalize(k, dim=-1)
        else:
            q = q / math.sqrt(self.head_dim)
        mask = real[:, None, None].expand(-1, -1, z.shape[1], -1)
        return attention(q.to(v.dtype), k.to(v.dtype), v, mask)

    def _sees_slots(self, here: Tensor, slots_at: Tensor) -> Tensor:
        """(B, T, N) which pooled inputs, ending at `slots_at` (B, N), each query sees."""
        first, behind = slots_at[:, None] - self.rate + 1, here[..., None] - self.reach
        seen = (first <= behind) & (first > behind - self.rate * self.slots)
        return seen & (slots_at > 0)[:, None]

    def _attend(
        self, z: Tensor, inputs: Tensor, at: Tensor, mask: Tensor, context: Context
    ) -> Tensor:
        """Attention of z (B, T, d) to inputs (B, S, d) at their places, where the mask is true."""
        q, k, v = (
            W(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for W, x in ((self.W_q, z), (self.W_k, inputs), (self.W_v, inputs))
        )
        angles = rotary_angles(at, self.head_dim, self.rope_theta)
        if self.cosine:
            q = unit_rotary(q, self.temperatures(), *context.rotary)
            k = unit_rotary(k, None, *angles)
        else:
            q = rotate(q.float() / math.sqrt(self.head_dim), *context.rotary)
            k = rotate(k.float(), *angles)
        q, k, mask = q.to(v.dtype), k.to(v.dtype), mask[:, None]
        if context.token_mask is not None:  # a softmax over nothing is not a number
            mask = mask | ~context.token_mask[:, None, :, None]
        if context.attention_weights is not None:
            context.attention_weights.append(attention_weights(q, k, mask))
        y = attention(q, k, v, mask, backend=context.attention_backend)
        return self.W_o(y.transpose(1, 2).flatten(2))

    def flops(self, length: int) -> float:
        """Of q k^T and its product with v, over what is seen of the inputs and the pooled ones."""
        w, c = self.reach, self.rate
        seen = causal_pairs(length, min(length, w))
        seen += sum(min(self.slots, (p - w) // c + 1) for p in range(w, length))
        return 4.0 * self.heads * self.head_dim * seen / length


def _same(query: Tensor, key: Tensor) -> Tensor:
    """(B, T, S) where a query and a key are of one document."""
    return query[..., None] == key[:, None]


def _last(chosen: Tensor, many: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """The last `many` (B, many, ...) of rows (B, N, ...) whose chosen ones are put last."""
    order = chosen.to(torch.uint8).argsort(dim=1, stable=True)[:, -many:]
    return tuple(x.take_along_dim(order.view(*order.shape, *[1] * (x.dim() - 2)), 1) for x in rows)
