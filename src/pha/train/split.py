"""Context parallelism: several processes read a piece of every sequence each."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from pha.caching import SequencePieces
from pha.ops.pieces import Pieces


class SequenceSplit:
    """Which piece of every sequence this process reads, and who reads the others.

    Processes that follow each other share sequences. Their gradients add up as those of processes
    with sequences of their own do.

    Args:
        ranks: processes to a sequence; more than 1.
        length: tokens of a sequence.
    """

    def __init__(self, ranks: int, length: int) -> None:
        me, world = dist.get_rank(), dist.get_world_size()
        for first in range(0, world, ranks):  # every process takes part in making every group
            group = dist.new_group(range(first, first + ranks))
            if first <= me < first + ranks:
                self.pieces = Pieces(group)
        self.tokens = length // ranks
        begin = self.pieces.rank * self.tokens
        self.here = slice(begin, begin + self.tokens)

    def cut(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The columns of this piece, of rows (B, T)."""
        return {name: x[:, self.here] if isinstance(x, Tensor) else x for name, x in inputs.items()}

    def past(self) -> SequencePieces:
        """For one forward pass: where the pieces before are."""
        return SequencePieces(self.pieces, self.tokens)
