"""Figures over seeds, differences between variants that share them, and what these support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

LEVEL = 0.05

Verdict = Literal["lower", "higher", "undecided", "one seed", "equal"]


@dataclass(frozen=True)
class Summary:
    """A figure over several seeds."""

    n: int  # how many seeds
    mean: float  # arithmetic mean
    std: float | None  # sample standard deviation (n - 1); None for one seed
    # half width of the 95% interval of the mean, by Student's t; None for one seed
    interval: float | None

    def show(self, digits: int = 2) -> str:
        """`16.51 ± 0.12`, the mean and the standard deviation; fewer digits from a thousand on."""
        kept = digits if abs(self.mean) < 1000 else max(0, digits - 2)
        mean = f"{self.mean:,.{kept}f}" if abs(self.mean) < 1e7 else f"{self.mean:.3g}"
        if self.std is None:
            return mean
        return f"{mean} ± {self.std:,.{kept}f}" if self.std < 1e7 else f"{mean} ± {self.std:.2g}"


def summarise(values: Sequence[float]) -> Summary:
    """Mean, deviation and interval of at least one finite value."""
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return Summary(1, mean, None, None)
    interval = stats.t.ppf(1 - LEVEL / 2, n - 1) * stats.sem(values)
    return Summary(n, mean, float(np.std(values, ddof=1)), float(interval))


def p_of_mean(values: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test that the mean is zero; None for one value."""
    from scipy import stats

    if len(values) == 1:
        return None
    if len(set(values)) == 1:  # of which scipy warns
        return 0.0 if values[0] else 1.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


@dataclass(frozen=True, kw_only=True)
class Difference(Summary):
    """A minus B, over the seeds that both have."""

    a: str  # name of the first
    b: str  # name of the second
    measure: str  # what is compared
    seeds: list[int]  # that both have finished
    p: float | None  # of the paired two-sided t-test; None for one seed
    p_adjusted: float | None  # by Holm, over the comparisons of the study
    verdict: Verdict  # what the interval says of A

    def sentence(
        self, labels: Mapping[str, str], words: str, digits: int, circumstance: str = ""
    ) -> str:
        """What the data support of A minus B, in plain words.

        Args:
            labels: name -> what it is called.
            words: the measure, such as `test perplexity per token`.
            digits: after the point.
            circumstance: such as `at equal tokens`.
        """
        a, b = labels[self.a], labels[self.b]
        what = f"{words} {circumstance}".rstrip()
        size = f"{abs(self.mean):.{digits}f}"
        seeds = f"{len(self.seeds)} paired seeds"
        direction = "lower" if self.mean < 0 else "higher"
        if self.verdict == "equal":
            text = f"{a} and {b} are equal in {what} ({seeds})"
        elif self.interval is None:
            text = (
                f"{a} is {direction} than {b} by {size} in {what}, with one seed, "
                "which does not say whether another seed would agree"
            )
        elif self.verdict == "undecided":
            text = (
                f"The data do not decide between {a} and {b} in {what}: {self.mean:+.{digits}f} "
                f"± {self.interval:.{digits}f} (95% interval, {seeds})"
            )
        else:
            text = (
                f"{a} is {direction} than {b} by {size} ± {self.interval:.{digits}f} in {what} "
                f"(95% interval, {seeds})"
            )
            if self.p_adjusted is not None and self.p_adjusted > LEVEL:
                text += "; with a correction for the number of comparisons this is not decided"
        return f"{text[0].upper()}{text[1:]}."


def paired_difference(
    a: str, b: str, measure: str, of_a: Mapping[int, float], of_b: Mapping[int, float]
) -> Difference | None:
    """Compare the values of A and B, seed -> value, by the seeds that both have.

    None if there is no such seed.
    """
    seeds = sorted(of_a.keys() & of_b.keys())
    if not seeds:
        return None
    values = [of_a[seed] - of_b[seed] for seed in seeds]
    over, p = summarise(values), p_of_mean(values)
    verdict: Verdict = "undecided"
    if over.interval is None:
        verdict = "one seed"
    elif not any(values):
        verdict = "equal"
    elif abs(over.mean) > over.interval:
        verdict = "lower" if over.mean < 0 else "higher"
    names: dict[str, Any] = {"a": a, "b": b, "measure": measure, "seeds": seeds}
    return Difference(**asdict(over), **names, p=p, p_adjusted=p, verdict=verdict)


def adjust(differences: Sequence[Difference]) -> list[Difference]:
    """Holm's correction of the p values for the number of comparisons."""
    p = np.array([each.p for each in differences if each.p is not None])
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    left = iter(adjusted.tolist())
    return [
        each if each.p is None else replace(each, p_adjusted=next(left)) for each in differences
    ]
