"""Selective copying: tokens scattered in noise, to be said in their order at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pha.tasks.task import IGNORE, Drawn, Task, distinct, register_task, require


@register_task("selective-copy")
@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """Data at random places among noise, and then as many marks, each of which asks for the next.

    As in Mamba (2312.00752, appendix E.1): what to keep depends on what it is, not on when it came.

    Attributes:
        size: data tokens there are.
        items: how many of them a sequence holds.
    """

    size: int = 14
    items: int = 16

    tests: ClassVar = {"256": {}, "512": {"length": 512}, "1024": {"length": 1024}}

    def words(self) -> list[str]:
        """Data, noise, mark."""
        return [*(f"w{i}" for i in range(self.size)), "noise", "mark"]

    def check(self, length: int) -> None:
        """See `Task.check`."""
        require(min(self.size, self.items) > 0, "size and items must be above 0")
        require(
            2 * self.items <= length,
            f"{self.items} items and as many marks do not fit {length} tokens; lower items",
        )

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Drawn:
        """See `Task.draw`."""
        first = length - self.items
        tokens = np.full((rows, length), self.size)
        tokens[:, first:] = self.size + 1
        data = random.integers(self.size, size=(rows, self.items))
        places = np.sort(distinct(random, rows, first, self.items), axis=1)
        np.put_along_axis(tokens, places, data, axis=1)
        labels, distances = (np.full((rows, length), fill) for fill in (IGNORE, 0))
        labels[:, first:] = data
        distances[:, first:] = first + np.arange(self.items) - places
        return Drawn(tokens, labels, distances)
