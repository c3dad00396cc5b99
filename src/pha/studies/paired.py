"""Differences between variants that share seeds and data order, and what they support."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

LEVEL = 0.05

Verdict = Literal["lower", "higher", "undecided", "one seed", "equal"]


@dataclass(frozen=True)
class Difference:
    """A minus B over the seeds that both have.

    Attributes:
        a: name of the first.
        b: name of the second.
        measure: what is compared.
        seeds: that both have finished.
        mean: of the differences.
        std: their sample deviation; None for one seed.
        interval: half width of the 95% interval of the mean, by Student's t; None for one seed.
        p: of the paired two-sided t-test; None for one seed.
        p_adjusted: by Holm, over the comparisons of the study.
        verdict: what the interval says of A.
    """

    a: str
    b: str
    measure: str
    seeds: tuple[int, ...]
    mean: float
    std: float | None
    interval: float | None
    p: float | None
    p_adjusted: float | None
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return asdict(self)


def paired_difference(
    a: str, b: str, measure: str, of_a: Mapping[int, float], of_b: Mapping[int, float]
) -> Difference | None:
    """Compare two variants by the seeds that both have; None if there is no such seed.

    Args:
        a: name of the first.
        b: name of the second.
        measure: what is compared.
        of_a: seed -> value.
        of_b: seed -> value.
    """
    from scipy import stats

    seeds = tuple(sorted(of_a.keys() & of_b.keys()))
    if not seeds:
        return None
    values = [of_a[seed] - of_b[seed] for seed in seeds]
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Difference(a, b, measure, seeds, mean, None, None, None, None, "one seed")
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    error = std / math.sqrt(n)
    interval = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    verdict: Verdict = "undecided"
    if mean == 0 and std == 0:
        verdict = "equal"
    elif abs(mean) > interval:
        verdict = "lower" if mean < 0 else "higher"
    return Difference(a, b, measure, seeds, mean, std, interval, p, p, verdict)


def adjust(differences: Sequence[Difference]) -> list[Difference]:
    """Holm's correction of the p values for the number of comparisons."""
    tested = sorted(
        (i for i, each in enumerate(differences) if each.p is not None),
        key=lambda i: differences[i].p or 0.0,
    )
    adjusted: dict[int, float] = {}
    largest = 0.0
    for rank, index in enumerate(tested):
        p = differences[index].p
        assert p is not None
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return [replace(each, p_adjusted=adjusted.get(i)) for i, each in enumerate(differences)]


def sentence(
    difference: Difference,
    labels: Mapping[str, str],
    words: str,
    digits: int,
    circumstance: str = "",
) -> str:
    """What the data support, in plain words.

    Args:
        difference: A minus B.
        labels: of A and B by name.
        words: the measure, such as `test perplexity per token`.
        digits: after the point.
        circumstance: such as `at equal tokens`.
    """
    text = _statement(difference, labels, words, digits, circumstance)
    return f"{text[0].upper()}{text[1:]}."


def _statement(
    difference: Difference, labels: Mapping[str, str], words: str, digits: int, circumstance: str
) -> str:
    a, b = labels[difference.a], labels[difference.b]
    where = f" {circumstance}" if circumstance else ""
    size = f"{abs(difference.mean):.{digits}f}"
    seeds = f"{len(difference.seeds)} paired seeds"
    if difference.verdict == "equal":
        return f"{a} and {b} are equal in {words}{where} ({seeds})"
    direction = "lower" if difference.mean < 0 else "higher"
    if difference.verdict == "one seed":
        return (
            f"{a} is {direction} than {b} by {size} in {words}{where}, with one seed, "
            "which does not say whether another seed would agree"
        )
    half = f"{difference.interval:.{digits}f}"
    if difference.verdict == "undecided":
        return (
            f"The data do not decide between {a} and {b} in {words}{where}: "
            f"{difference.mean:+.{digits}f} ± {half} (95% interval, {seeds})"
        )
    text = f"{a} is {direction} than {b} by {size} ± {half} in {words}{where}"
    text += f" (95% interval, {seeds})"
    if difference.p_adjusted is not None and difference.p_adjusted > LEVEL:
        text += "; with a correction for the number of comparisons this is not decided"
    return text
