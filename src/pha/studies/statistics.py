"""Means over seeds, with what they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """A figure over several seeds.

    Attributes:
        n: how many seeds.
        mean: arithmetic mean.
        std: sample standard deviation (n - 1); None for one seed.
        interval: half width of the 95% interval of the mean, by Student's t; None for one seed.
    """

    n: int
    mean: float
    std: float | None
    interval: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return asdict(self)

    def show(self, digits: int = 2) -> str:
        """`16.51 ± 0.12`, the mean and the standard deviation, as the paper writes it.

        Args:
            digits: after the point; fewer from a thousand on.
        """
        kept = digits if abs(self.mean) < 1000 else max(0, digits - 2)
        mean = f"{self.mean:,.{kept}f}" if abs(self.mean) < 1e7 else f"{self.mean:.3g}"
        if self.std is None:
            return mean
        return f"{mean} ± {self.std:,.{kept}f}" if self.std < 1e7 else f"{mean} ± {self.std:.2g}"


def summarise(values: Sequence[float]) -> Summary:
    """Mean, deviation and interval of at least one finite value."""
    from scipy import stats

    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Summary(1, mean, None, None)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Summary(n, mean, std, float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n))
