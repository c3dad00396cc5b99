"""Context parallelism: several processes read a piece of every sequence each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pha.caching import SequencePieces
from pha.costs import shell
from pha.model import ArchitectureConfig
from pha.model.silence import branches_of
from pha.ops.pieces import Pieces
from pha.utils.hardware import autocast

PROBES = 64, 128  # tokens, more than any short convolution looks back


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


class CountedPieces(Pieces):
    """One of some ranks, which only notes what it would receive from the others."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.group, self.rank, self.size = None, rank, size
        self.reader, self.received = "", Counter[str]()

    def gather(self, x: Tensor) -> Tensor:
        """(R, ...), of no values."""
        self.received[self.reader] += (self.size - 1) * x.nbytes
        return x.new_empty(self.size, *x.shape)


def gathered_bytes(
    config: ArchitectureConfig, precision: str, length: int, ranks: int
) -> dict[str, int]:
    """By branch, the bytes that each rank receives to read its piece of one sequence.

    Counted on fake tensors, at two lengths, as what is gathered is linear in the length. The
    backward pass adds as much up for every rank, twice that in all.

    Raises:
        PHAError: a branch cannot read pieces.
    """
    counted, counts = CountedPieces(ranks), []
    with FakeTensorMode(), torch.no_grad():
        model = shell(config)
        model.model.require_pieces()
        for (_, name), branch in branches_of(model.model).items():
            branch.register_forward_pre_hook(lambda *_, name=name: setattr(counted, "reader", name))
        for tokens in PROBES:
            counted.received = Counter()
            with autocast("cpu", precision):
                past = SequencePieces(counted, tokens)
                model.model(torch.zeros(1, tokens, dtype=torch.long), past_key_values=past)
            counts.append(counted.received)
    short, long = counts
    more = (length // ranks - PROBES[0]) / (PROBES[1] - PROBES[0])
    return {name: round(short[name] + more * (long[name] - short[name])) for name in short}
