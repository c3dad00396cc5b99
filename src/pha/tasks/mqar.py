"""Multi-query associative recall: pairs of key and value, then keys whose values are asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from pha.tasks.task import (
    IGNORE,
    Drawn,
    Task,
    distinct,
    one_of,
    register_task,
    require,
    require_odds,
)


@register_task("mqar")
@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """k pairs, and then every key once in random order, each followed by its value.

    Keys differ within a sequence; values are drawn with replacement, so that none can be ruled out.
    One k holds for all sequences of a step. A sequence is dense, 4k + 2 `updates` tokens, and a row
    of the batch holds as many as fit. With a `gap` it is as long as the row: noise stands between
    pairs and queries and, for the rest, in front. The defaults are of a size at which two layers of
    attention learn to recall 32 pairs in some 400 steps of 4,096 tokens.

    Attributes:
        keys: how many there are to draw from.
        values: likewise.
        noise: likewise, of tokens that mean nothing.
        pairs: values of k.
        odds: of each of them; null: all alike.
        gap: fewest and most tokens of noise between pairs and queries, drawn for each sequence.
        updates: keys that get a second value after the pairs; the last one is asked.
    """

    keys: int = 64
    values: int = 56
    noise: int = 8
    pairs: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    odds: list[float] | None = field(default_factory=lambda: [40.0, 30.0, 20.0, 10.0])
    gap: list[int] | None = None
    updates: int = 0

    tests: ClassVar = {str(k): {"pairs": [k], "length": 4 * k} for k in (32, 4, 8, 16, 64)}

    def words(self) -> list[str]:
        """Keys, values, noise."""
        kinds = (("k", self.keys), ("v", self.values), ("n", self.noise))
        return [f"{kind}{i}" for kind, size in kinds for i in range(size)]

    def _used(self, k: int) -> int:
        """Tokens of pairs, updates and queries."""
        return 4 * k + 2 * self.updates

    def check(self, length: int) -> None:
        """See `Task.check`."""
        require(min(self.keys, self.values) > 0 <= self.noise, "keys and values must be above 0")
        require_odds("pairs", self.pairs, self.odds)
        gap = [0, 0] if self.gap is None else self.gap
        fits = len(gap) == 2 and 0 <= gap[0] <= gap[1]
        require(fits, f"gap is {self.gap}; give the fewest and the most tokens, such as [0, 64]")
        require(self.gap is None or self.noise > 0, "a gap is filled with noise; noise is 0")
        for k in self.pairs:
            require(1 <= k <= self.keys, f"pairs has {k}; it must be from 1 to keys ({self.keys})")
            require(
                0 <= self.updates <= k,
                f"updates is {self.updates}; it must be from 0 to pairs ({k})",
            )
            needed = self._used(k) + gap[1]
            require(
                needed <= length,
                f"{k} pairs with their queries, updates and gap take {needed} tokens, more than "
                f"the length of {length}; lower pairs or gap, or raise the length",
            )

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Drawn:
        """See `Task.draw`."""
        k, u = one_of(random, self.pairs, self.odds), self.updates
        used = self._used(k)
        T = used if self.gap is None else length
        n = rows * (length // T)
        keys = distinct(random, n, self.keys, k)
        values = self.keys + random.integers(self.values, size=(n, k + u))
        again = distinct(random, n, k, u)  # which pairs are written a second time
        written = np.concatenate([keys, np.take_along_axis(keys, again, 1)], axis=1)
        last = np.tile(np.arange(k), (n, 1))  # where among `written` each key's value stands
        np.put_along_axis(last, again, k + np.arange(u)[None], axis=1)
        order = distinct(random, n, k, k)
        last = np.take_along_axis(last, order, 1)
        asked, answers = np.take_along_axis(keys, order, 1), np.take_along_axis(values, last, 1)
        tokens = np.empty((n, T), dtype=np.int64)
        start = np.zeros(n, dtype=np.int64)
        if self.gap is not None:
            tokens[:] = self.keys + self.values + random.integers(self.noise, size=(n, T))
            start = T - used - random.integers(self.gap[0], self.gap[1] + 1, size=n)
        first = T - 2 * k
        pairs = np.stack([written, values], axis=2).reshape(n, -1)
        np.put_along_axis(tokens, start[:, None] + np.arange(pairs.shape[1]), pairs, axis=1)
        tokens[:, first:] = np.stack([asked, answers], axis=2).reshape(n, -1)
        labels, distances = (np.full((n, T), fill, dtype=np.int64) for fill in (IGNORE, 0))
        labels[:, first::2] = answers
        distances[:, first::2] = first + 2 * np.arange(k) - (start[:, None] + 2 * last + 1)
        return Drawn(tokens, labels, distances)


@register_task("mqar-zoology")
@dataclass(frozen=True, kw_only=True)
class ZoologyMQAR(Task):
    """The distribution of HazyResearch/zoology at commit d88d6f5.

    Token 0 is filler, then come keys and values in halves, each drawn without replacement. After
    the pairs there are (T - 2k) / 2 slots of two tokens. Each key stands at the first token of one,
    slot i (from 1) with odds i^(`power` - 1), and its value is the label there; it does not follow.
    One T and k hold for all sequences of a step, and a row of the batch holds as many as fit.

    Attributes:
        vocabulary: V, filler included.
        power: a; 1 is uniform, and 0.01 asks most keys soon.
        sizes: pairs of T and k.
        odds: of each of them; null: all alike.
        random_filler: fill with random tokens of the whole vocabulary in the place of 0.
    """

    vocabulary: int = 8192
    power: float = 0.01
    sizes: list[list[int]] = field(
        default_factory=lambda: [[64, 4], [128, 8], [256, 16], [256, 32], [256, 64]]
    )
    odds: list[float] | None = field(default_factory=lambda: [5.0, 1.0, 1.0, 1.0, 1.0])
    random_filler: bool = True

    tests: ClassVar = {
        f"{T}/{k}": {"sizes": [[T, k]], "length": T}
        for T, k in ((256, 64), (64, 4), (64, 8), (64, 16), (128, 32), (512, 128), (1024, 256))
    }

    def words(self) -> list[str]:
        """Filler, keys, values."""
        half = self.vocabulary // 2
        keys = [f"k{i}" for i in range(1, half)]
        return ["0", *keys, *(f"v{i}" for i in range(half, self.vocabulary))]

    def check(self, length: int) -> None:
        """See `Task.check`."""
        require_odds("sizes", self.sizes, self.odds)
        require(self.power > 0, f"power is {self.power}; it must be above 0")
        for size in self.sizes:
            require(len(size) == 2, f"sizes has {size}; give pairs of length and pairs")
            T, k = size
            most = self.vocabulary // 2 - 1
            require(1 <= k <= most, f"sizes has {k} pairs; from 1 to {most} fit the vocabulary")
            require(4 * k <= T, f"{k} pairs and their queries need {4 * k} tokens, not {T}")
            require(length >= T, f"sizes has {T} tokens, more than the length of {length}")

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Drawn:
        """See `Task.draw`."""
        T, k = one_of(random, self.sizes, self.odds)
        n, half = rows * (length // T), self.vocabulary // 2
        keys = 1 + distinct(random, n, half - 1, k)
        values = half + distinct(random, n, self.vocabulary - half, k)
        tokens, labels, distances = (np.full((n, T), fill) for fill in (0, IGNORE, 0))
        if self.random_filler:
            tokens[:] = random.integers(self.vocabulary, size=(n, T))
        tokens[:, : 2 * k] = np.stack([keys, values], axis=2).reshape(n, -1)
        # The k largest of log odds plus Gumbel noise are draws without replacement, in order.
        slots = (T - 2 * k) // 2
        scores = (self.power - 1) * np.log(1 + np.arange(slots)) + random.gumbel(size=(n, slots))
        places = 2 * k + 2 * (-scores).argsort(axis=1)[:, :k]
        np.put_along_axis(tokens, places, keys, axis=1)
        np.put_along_axis(labels, places, values, axis=1)
        np.put_along_axis(distances, places, places - (1 + 2 * np.arange(k)), axis=1)
        return Drawn(tokens, labels, distances)
