"""Steps that do not exist, such as padding, wherever in a row they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class VisibleFirst:
    """Moves the visible steps of each row to its front, and back.

    A causal op then needs no mask, since no step changes an earlier one: only its last state has
    to be that after `count` steps.

    Args:
        mask: (B, T) bool, false where there is no step.

    Attributes:
        count: (B,) visible steps of each row.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.count = mask, mask.sum(-1)
        self._rows = torch.arange(len(mask), device=mask.device)[:, None] * mask.shape[1]
        self._order = (~mask).to(torch.uint8).argsort(stable=True)

    def front(self, x: Tensor) -> Tensor:
        """x (B, T, ...) with the visible steps of each row first, in their order."""
        return self._pick(x, self._order)

    def back(self, x: Tensor) -> Tensor:
        """What `front` would make x (B, T, ...) of, except for zeros where there is no step."""
        x = self._pick(x, (self.mask.cumsum(-1) - 1).clamp(min=0))
        return torch.where(self.mask.view(*self.mask.shape, *[1] * (x.dim() - 2)), x, 0)

    def front_starts(self, starts: Tensor) -> Tensor:
        """(B, T) bool like `starts`: a document that starts at no step starts at the next."""
        document = self.front(torch.where(self.mask, starts.cumsum(-1), -1))
        return document > F.pad(document, (1, 0))[:, :-1]

    def ends_empty(self, starts: Tensor) -> Tensor:
        """(B,) bool: a document starts after the last visible step."""
        document = starts.cumsum(-1)
        return document[:, -1] > torch.where(self.mask, document, 0).amax(-1)

    def _pick(self, x: Tensor, places: Tensor) -> Tensor:
        chosen = x.flatten(0, 1).index_select(0, (self._rows + places).flatten())
        return chosen.view(*places.shape, *x.shape[2:])
