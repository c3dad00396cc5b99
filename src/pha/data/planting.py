"""Planted repeats: random tokens that stand twice in a text, so that only memory predicts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SPAN = 32
"""Tokens of a planted repeat."""

_PLANTS = 1  # at the end of a key: apart from the order of the windows, which has keys of its own


class Planter:
    """Draws tokens by how frequent they are: a pure function of a key, the same for all time.

    Args:
        frequencies: (V,) how often each id occurs.
    """

    def __init__(self, frequencies: np.ndarray) -> None:
        self._upto = np.cumsum(frequencies)

    def draw(self, key: Sequence[int], count: int = SPAN) -> np.ndarray:
        """(count,) int64 ids, each drawn by its frequency, with replacement."""
        return self._tokens(_uniform(key, count))

    def plant(self, ids: np.ndarray, rate: float, key: Sequence[int]) -> None:
        """With odds `rate`, write a random span into two places of a row `ids`.

        They may be anywhere, but do not overlap. The row has at least 2 `SPAN` tokens.
        """
        decision, *places = _uniform([*key, _PLANTS], 3 + SPAN).tolist()
        if decision >= rate:
            return
        room = len(ids) - 2 * SPAN + 1
        first, second = sorted(int(place * room) for place in places[:2])
        span = self._tokens(np.array(places[2:]))
        ids[first : first + SPAN] = ids[second + SPAN : second + 2 * SPAN] = span

    def _tokens(self, uniform: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._upto, uniform * self._upto[-1], side="right")


def _uniform(key: Sequence[int], count: int) -> np.ndarray:
    """(count,) float64 in [0, 1), from raw PCG64 output, which numpy promises to keep."""
    bits = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53
