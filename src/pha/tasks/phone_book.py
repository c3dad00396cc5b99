"""A phone book: names with numbers, then names whose numbers are asked. MQAR in a natural form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pha.tasks.task import IGNORE, Drawn, Task, distinct, register_task, require


@register_task("phone-book")
@dataclass(frozen=True, kw_only=True)
class PhoneBook(Task):
    """Entries `first last : d d d d ;` in a book, and then some of them again, digits asked.

    A row of the batch holds as many sequences as fit.

    Attributes:
        names: first names there are, and last names; no two entries share both.
        digits: of a number.
        entries: in the book.
        queries: names that are asked, each once.
    """

    names: int = 32
    digits: int = 4
    entries: int = 24
    queries: int = 4

    tests: ClassVar = {str(n): {"entries": n, "length": 8 * (n + 4)} for n in (24, 8, 16, 48, 96)}

    def words(self) -> list[str]:
        """Digits, colon and semicolon, first names, last names."""
        names = [f"{kind}{i}" for kind in ("first", "last") for i in range(self.names)]
        return [*map(str, range(10)), ":", ";", *names]

    def _line(self) -> int:
        """Tokens of an entry."""
        return self.digits + 4

    def check(self, length: int) -> None:
        """See `Task.check`."""
        require(self.digits > 0, f"digits is {self.digits}; at least 1")
        most = self.names**2
        require(
            1 <= self.queries <= self.entries <= most,
            f"entries is {self.entries}; from queries ({self.queries}, at least 1) to {most} names",
        )
        needed = self._line() * (self.entries + self.queries)
        require(
            needed <= length,
            f"{self.entries} entries and {self.queries} queries take {needed} tokens, more than "
            f"the length of {length}; lower entries, or raise the length",
        )

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Drawn:
        """See `Task.draw`."""
        line, lines = self._line(), self.entries + self.queries
        n = rows * (length // (line * lines))
        name = distinct(random, n, self.names**2, self.entries)
        book = np.empty((n, self.entries, line), dtype=np.int64)
        book[:, :, 0] = 12 + name // self.names
        book[:, :, 1] = 12 + self.names + name % self.names
        book[:, :, 2], book[:, :, -1] = 10, 11
        book[:, :, 3:-1] = random.integers(10, size=(n, self.entries, self.digits))
        asked = distinct(random, n, self.entries, self.queries)
        again = np.take_along_axis(book, asked[:, :, None], axis=1)
        tokens = np.concatenate([book, again], axis=1)
        labels, distances = (np.full(tokens.shape, fill) for fill in (IGNORE, 0))
        labels[:, self.entries :, 2 : 2 + self.digits] = again[:, :, 3:-1]
        # From where a digit is asked, before it is said, back to where it stands in the book.
        back = line * (self.entries + np.arange(self.queries) - asked) - 1
        distances[:, self.entries :, 2 : 2 + self.digits] = back[:, :, None]
        shape = n, line * lines
        return Drawn(tokens.reshape(shape), labels.reshape(shape), distances.reshape(shape))
