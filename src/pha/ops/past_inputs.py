"""Causal convolutions whose state is their last inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.visible import VisibleFirst


def with_past(
    convolve: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    w: int,
    past: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
    last_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Convolve with w taps over the inputs and those before them, and keep the last ones.

    Args:
        convolve: of x (B, P + T, C), which begins with the P inputs of `past`, and starts (B, T),
            to y (B, T, C).
        x: (B, T, C) inputs.
        w: taps.
        past: (B, w - 1, C) inputs before the first step, or None where they are zero; P is then 0.
        starts: (B, T) bool, true where a document begins, or None.
        mask: (B, T) bool, false where there is no step, or None.
        last_state: whether the last inputs are wanted.

    Returns:
        y (B, T, C), 0 where there is no step, and the last inputs (B, w - 1, C), zeros where they
        are not of the present document, or None.
    """
    B, T, C = x.shape
    if T == 0:
        past = x.new_zeros(B, w - 1, C) if past is None else past
        return x, past if last_state else None
    empty, visible = None, None
    if mask is not None:
        visible = VisibleFirst(mask)
        x = visible.front(x)
        if starts is not None:
            empty, starts = visible.ends_empty(starts)[:, None], visible.front_starts(starts)
    x = x if past is None else torch.cat([past.to(x.dtype), x], 1)
    with torch.autocast(x.device.type, enabled=False):
        y = convolve(x, starts)
    if visible is not None:
        y = visible.back(y)
    if not last_state:
        return y, None
    x = F.pad(x, (0, 0, w - 1, 0)) if past is None else x
    if visible is None and starts is None:
        return y, x[:, T:].clone()  # not a view, which would keep all of x
    count = torch.full((B,), T, device=x.device) if visible is None else visible.count
    places = count[:, None] + torch.arange(w - 1, device=x.device)
    last = x.take_along_dim(places.unsqueeze(-1), 1)
    if starts is not None:
        document = documents(starts, w - 1).take_along_dim(places, 1)
        old = document < document[:, -1:]
        old = old if empty is None else old | empty
        last = torch.where(old.unsqueeze(-1), 0, last)
    return y, last


def documents(starts: Tensor, before: int) -> Tensor:
    """(B, before + T): the document of each step, 0 for that of so many inputs before."""
    return F.pad(starts.cumsum(1), (before, 0))
