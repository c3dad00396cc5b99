"""Induction with one trigger: what followed it the first time is asked the second time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pha.tasks.task import IGNORE, Drawn, Task, register_task, require


@register_task("induction")
@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Random tokens in which the trigger stands once somewhere, and once more at the end.

    As in Mamba (2312.00752, appendix E.1): one answer a sequence, the token after the trigger.

    Attributes:
        size: tokens there are besides the trigger.
    """

    size: int = 15

    tests: ClassVar = {
        str(T): {"length": T, "rows": min(1000, 1_000_000 // T)}
        for T in (256, 64, 128, 512, 1024, 4096)
    }

    def words(self) -> list[str]:
        """Numbered, and the trigger."""
        return [*(f"w{i}" for i in range(self.size)), "trigger"]

    def check(self, length: int) -> None:
        """See `Task.check`."""
        require(self.size > 1, f"size is {self.size}; at least 2")
        require(length >= 3, f"the length is {length}; at least 3")

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Drawn:
        """See `Task.draw`."""
        tokens = random.integers(self.size, size=(rows, length))
        row, place = np.arange(rows), random.integers(length - 2, size=rows)
        tokens[row, place] = tokens[:, -1] = self.size
        labels, distances = (np.full((rows, length), fill) for fill in (IGNORE, 0))
        labels[:, -1] = tokens[row, place + 1]
        distances[:, -1] = length - 1 - (place + 1)
        return Drawn(tokens, labels, distances)
