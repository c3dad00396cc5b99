"""Sequences in pieces, one on each rank of a group: what the ranks must tell each other.

Each rank runs a recurrence over its own piece as if nothing had come before. It is linear, so what
did come before only adds to that: a state S that enters a piece is, after t steps, the product of
their decays times S. One gathering of small tensors tells every rank the last state of each piece
and the product of all its decays, from which the state that enters its own follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pha.utils.errors import PHAError


class Pieces:
    """The ranks that have the pieces, in order.

    Args:
        group: of processes; None is all of them.

    Attributes:
        rank: of this process in the group, and so the number of its piece.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, x: Tensor) -> Tensor:
        """x (...) of every rank, (R, ...). Gradients of all ranks reach the one that it is of."""
        gathered: Tensor = _Gather.apply(x, self)
        return gathered

    def up_to_here(self, x: Tensor, dim: int) -> Tensor:
        """x of every rank up to this one, one behind the other."""
        return torch.cat(self._mine(self.gather(x)), dim)

    def before(self, x: Tensor, many: int) -> Tensor:
        """The last of x (B, T, ...) on the rank before, (B, many, ...); zeros on the first.

        Raises:
            PHAError: pieces are shorter.
        """
        if x.shape[1] < many:
            raise PHAError(f"pieces of {x.shape[1]} tokens; one has to look {many} back")
        tails = self.gather(x[:, -many:])
        mine = torch.arange(self.size, device=x.device) == self.rank - 1
        return torch.where(mine.view(-1, *[1] * x.dim()), tails, 0).sum(0)

    def entering(self, last: Tensor, kept: Tensor) -> Tensor:
        """The state that enters this piece, like `last`.

        Args:
            last: (B, ...) state after this piece, if nothing enters it.
            kept: (B, ...) product of its decays, of as many dimensions as `last`.
        """
        both = self.gather(torch.cat([last.flatten(1), kept.flatten(1)], 1))
        state = torch.zeros_like(last)
        for piece in self._mine(both)[:-1]:
            left, decay = piece.split([last[0].numel(), kept[0].numel()], 1)
            state = decay.view_as(kept) * state + left.view_as(last)
        # Where nothing enters, too: all ranks have to take part in the backward pass.
        return state + torch.where(torch.zeros_like(both, dtype=torch.bool), both, 0).sum()

    @staticmethod
    def computed_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What enters, at every token: too large to keep, and cheap to compute for the way back."""
        result: Tensor = checkpoint(function, *inputs, use_reentrant=False)
        return result

    def _mine(self, gathered: Tensor) -> list[Tensor]:
        return list(gathered.unbind())[: self.rank + 1]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        gathered = x.new_empty(pieces.size, *x.shape)
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=pieces.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=ctx.pieces.group)
        return summed[ctx.pieces.rank], None
