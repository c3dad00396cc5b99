"""N-grams of a text: where each occurred before, and how often it occurs in another text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_COUNTED_TOKENS = 1 << 22  # at a time, some 50 bytes each


class NGrams:
    """The n-grams of a text up to a length, numbered such that equal ones share a number.

    An n-gram is told by the number of the (n-1)-gram before its last token and by that token, so
    numbers are exact whatever the vocabulary. Memory: some 24 bytes a token for each length.

    Args:
        tokens: (N,) ids.
        longest: of n, at least 1.
        vocab_size: every id is below it.
    """

    def __init__(self, tokens: np.ndarray, longest: int, vocab_size: int) -> None:
        self._vocab = vocab_size
        self._numbers = [tokens.astype(np.int64)]
        self._known: list[np.ndarray] = []  # of each length from 2 on, its codes in order
        for _ in range(1, longest):
            codes = self._codes(self._numbers[-1], self._numbers[0])
            known, numbers = np.unique(codes, return_inverse=True)
            self._known.append(known)
            self._numbers.append(numbers)

    def earlier(self, n: int) -> np.ndarray:
        """(N,) int64: where the n-gram that ends at each token last ended before; -1 for nowhere.

        The two may overlap.
        """
        numbers = self._numbers[n - 1]
        order = np.argsort(numbers, kind="stable")
        same = numbers[order[1:]] == numbers[order[:-1]]
        found = np.full(len(numbers) + n - 1, -1, dtype=np.int64)
        found[order[1:][same] + n - 1] = order[:-1][same] + n - 1
        return found

    def counts(self, tokens: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
        """(N,) int64 for each n of `lengths`: how often the n-gram that ends there is in `tokens`.

        0 where there is none yet. The other text is read in parts.
        """
        longest = max(lengths)
        totals = {n: np.zeros(int(self._numbers[n - 1].max(initial=-1)) + 1) for n in lengths}
        for start in range(0, len(tokens), _COUNTED_TOKENS):
            first = max(0, start - longest + 1)
            part = numbers = tokens[first : start + _COUNTED_TOKENS].astype(np.int64)
            for n in range(1, longest + 1):
                if n > 1:
                    codes, known = self._codes(numbers, part), self._known[n - 2]
                    place = np.searchsorted(known, codes).clip(max=len(known) - 1)
                    numbers = np.where(known[place] == codes, place, -1)
                if n in totals:
                    new = numbers[max(0, start - first - n + 1) :]  # those that end in this part
                    within = new[(new >= 0) & (new < len(totals[n]))]
                    totals[n] += np.bincount(within, minlength=len(totals[n]))
        return [
            np.pad(totals[n][self._numbers[n - 1]].astype(np.int64), (n - 1, 0)) for n in lengths
        ]

    def _codes(self, numbers: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Of the n-grams one longer than those of `numbers`; below zero where that is."""
        return numbers[:-1] * self._vocab + tokens[len(tokens) - len(numbers) + 1 :]


class Repeats(NamedTuple):
    """The n-grams that end at the tokens 1 .. N - 1 of a text; entry i is of token i + 1.

    Attributes:
        earlier: (N - 1,) where it last ended before in what the prediction sees; -1 for nowhere.
        counts: (N - 1,) how often it occurs in the text of reference.
    """

    earlier: np.ndarray
    counts: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """(N - 1,) whether it occurred before."""
        return self.earlier >= 0

    @property
    def distance(self) -> np.ndarray:
        """(N - 1,) tokens from there to here; means nothing where it did not occur."""
        return np.arange(1, len(self.earlier) + 1) - self.earlier


def repeats(
    tokens: np.ndarray,
    contexts: np.ndarray,
    lengths: Sequence[int],
    vocab_size: int,
    reference: np.ndarray,
) -> dict[int, Repeats]:
    """n -> the repeated n-grams of `tokens` (N,), for each n of `lengths`.

    `contexts` (N - 1,) is the first token that the prediction of token i + 1 sees, and all of the
    earlier n-gram must be there. `reference` is the text in which n-grams are counted.
    """
    grams = NGrams(tokens, max(lengths), vocab_size)
    found = {}
    for n, counts in zip(lengths, grams.counts(reference, lengths), strict=True):
        earlier = grams.earlier(n)[1:]
        earlier = np.where(earlier - (n - 1) >= contexts, earlier, -1)
        found[n] = Repeats(earlier, counts[1:])
    return found
