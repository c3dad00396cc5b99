"""Parity of the bits so far, asked at every step: counting, which needs a state that flips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pha.tasks.task import Drawn, Task, register_task, require


@register_task("parity")
@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Random bits; the label of each is whether the ones up to it are even or odd in number.

    Attributes:
        ones: odds of a one.
    """

    ones: float = 0.5

    length: ClassVar = 64
    tests: ClassVar = {"64": {}, "256": {"length": 256}}

    def words(self) -> list[str]:
        """Bits, and the two answers."""
        return ["0", "1", "even", "odd"]

    def check(self, length: int) -> None:
        """See `Task.check`."""
        require(0 < self.ones < 1, f"ones is {self.ones}; it must be between 0 and 1")

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Drawn:
        """See `Task.draw`."""
        bits = (random.random((rows, length)) < self.ones).astype(np.int64)
        return Drawn(bits, 2 + bits.cumsum(axis=1) % 2)
