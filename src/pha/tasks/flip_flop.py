"""One bit to hold: `write b`, `ignore b`, `read`, which asks for the bit that was written last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pha.tasks.task import IGNORE, Drawn, Task, register_task, require


@register_task("flip-flop")
@dataclass(frozen=True, kw_only=True)
class FlipFlop(Task):
    """The language of Liu et al. (2023, arXiv 2306.00946): it begins with a write, ends in a read.

    Instructions and bits alternate. Writing and reading have the odds that `ignore` leaves, half
    each. Bits that are written or ignored are random, and the label of a read is its bit.

    Attributes:
        ignore: odds of an instruction to ignore what follows.
    """

    ignore: float = 0.8

    tests: ClassVar = {
        "as trained": {"rows": 400},
        "sparse": {"ignore": 0.98, "length": 1024, "rows": 400},
        "dense": {"ignore": 0.1, "length": 1024, "rows": 100},
    }

    def words(self) -> list[str]:
        """Two bits and three instructions."""
        return ["0", "1", "write", "ignore", "read"]

    def check(self, length: int) -> None:
        """See `Task.check`."""
        require(0 <= self.ignore < 1, f"ignore is {self.ignore}; from 0 to below 1")
        require(
            length >= 4 and length % 2 == 0,
            f"the length is {length}; give an even one of at least 4",
        )

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Drawn:
        """See `Task.draw`."""
        half = (1 - self.ignore) / 2
        many = length // 2
        kinds = 2 + random.choice(3, size=(rows, many), p=[half, self.ignore, half])
        kinds[:, 0], kinds[:, -1] = 2, 4
        bits = random.integers(2, size=(rows, many))
        writes = np.where(kinds == 2, np.arange(many), 0)
        last = np.maximum.accumulate(writes, axis=1)  # the latest write, at each instruction
        reads = kinds == 4
        bits = np.where(reads, np.take_along_axis(bits, last, 1), bits)
        tokens = np.stack([kinds, bits], axis=2).reshape(rows, length)
        labels, distances = (np.full((rows, length), fill) for fill in (IGNORE, 0))
        labels[:, ::2] = np.where(reads, bits, IGNORE)
        distances[:, ::2] = np.where(reads, 2 * (np.arange(many) - last) - 1, 0)
        return Drawn(tokens, labels, distances)
