"""Work that several processes share by taking turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def turns(items: Sequence[Item], share: tuple[int, int]) -> Iterator[tuple[Item, bool]]:
    """The items of one process out of several, and whether each counts.

    All processes get equally many, as sharded weights are whole only where every process asks for
    them: in the last round those for whom there is none do the first item again, and it counts not.

    Args:
        items: all of them, in the same order in every process.
        share: (rank, ranks).
    """
    rank, ranks = share
    for first in range(0, len(items), ranks):
        counts = first + rank < len(items)
        yield items[first + rank if counts else 0], counts
