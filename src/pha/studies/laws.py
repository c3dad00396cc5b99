"""How bits per byte fall with training FLOPs: a power law for each model over sizes of it.

Each model is trained at several sizes, with the same FLOPs at a size. bits = a FLOPs^b is fitted to
the logarithms by least squares, a point for the mean over the seeds of a size, so the intervals
(Student's t) are of sizes, not of seeds. The law has no floor: over few sizes none can be told from
a lower exponent. So an exponent is that of its range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from pha.report.tables import Section, TextTable
from pha.studies.definition import LEAST
from pha.studies.outcome import Outcome, Row
from pha.studies.seeds import LEVEL
from pha.utils.text import DASH, count, fixed


@dataclass(frozen=True)
class Line:
    """y = slope (x - middle) + height, with the half widths of the 95% intervals."""

    middle: float
    height: float
    slope: float
    height_interval: float
    slope_interval: float

    def power(self, x: float) -> float:
        """What a line over logarithms comes to at x, which is none."""
        return math.exp(self.height + self.slope * (math.log(x) - self.middle))


@dataclass(frozen=True)
class Law:
    """A model over its sizes."""

    label: str
    flops: list[float]  # of training, by size, smallest first
    bits: list[float]  # per byte of the test split, as long
    line: Line | None  # ln bits over ln FLOPs; None for fewer than `LEAST` sizes
    # ln of the bits over those of the baseline at the same size, over ln FLOPs; None for that
    # model itself, and for too few sizes of both
    gap: Line | None


def fit(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """The line of least squares; None for fewer than `LEAST` points, or for points of one place."""
    from scipy import stats

    if len(x) < LEAST or not max(x) > min(x):
        return None
    found = stats.linregress(x, y)
    reach = float(stats.t.ppf(1 - LEVEL / 2, len(x) - 2) * found.stderr)
    # The error of the height is that of the slope at a deviation of x from the middle.
    return Line(fmean(x), fmean(y), float(found.slope), reach * float(np.std(x)), reach)


def laws_of(outcome: Outcome) -> list[Law]:
    """A law for each model that has a finished size, as they come; the first is the baseline."""
    axis, base = outcome.plan.study.axis, outcome.rows[0].variant.base
    models: dict[str, dict[str, tuple[float, float]]] = {}
    for row in outcome.rows:
        if (point := _point(row)) is not None:
            models.setdefault(row.variant.base, {})[row.variant.places[axis]] = point
    return [
        _law(label, points, {} if label == base else models.get(base, {}))
        for label, points in models.items()
    ]


def _point(row: Row) -> tuple[float, float] | None:
    """FLOPs and bits per byte, means over the seeds; None where a run diverged."""
    bits = row.summary("bits")
    results = [seed.result for seed in row.seeds if seed.result is not None]
    if bits is None or row.diverged:
        return None
    return fmean((r.model.flops_per_token or math.nan) * r.tokens_seen for r in results), bits.mean


def _law(
    label: str,
    points: Mapping[str, tuple[float, float]],
    base: Mapping[str, tuple[float, float]],
) -> Law:
    flops, bits = map(list, zip(*sorted(points.values()), strict=True))
    both = [(math.log(f), math.log(b / base[at][1])) for at, (f, b) in points.items() if at in base]
    return Law(
        *(label, flops, bits),
        fit(list(map(math.log, flops)), list(map(math.log, bits))),
        fit([x for x, _ in both], [y for _, y in both]),
    )


def analyse(outcome: Outcome) -> tuple[TextTable, list[str], dict[str, Any]]:
    """The table of exponents, what the data support, and the record for JSON."""
    laws, base = laws_of(outcome), outcome.rows[0].variant.base
    rows, sentences = [], []
    for law in laws:
        gain, change = (DASH, DASH) if law.gap is None else _in_percent(law.gap)
        exponent = DASH
        if law.line is not None:
            exponent = f"{law.line.slope:.4f} ± {law.line.slope_interval:.4f}"
        ends = f"{fixed(law.bits[0], 3)} to {fixed(law.bits[-1], 3)}"
        over = f"{count(law.flops[0])} to {count(law.flops[-1])}"
        rows.append([law.label, str(len(law.bits)), over, ends, exponent, gain, change])
        if law.gap is not None:
            told = abs(law.gap.slope) > law.gap.slope_interval
            sentences.append(
                f"The bits per byte of {law.label} differ from those of {base} by {gain} at "
                f"{count(math.exp(law.gap.middle))} FLOP, the middle of the range. Ten times the "
                f"FLOPs change that by {change} (95% intervals over sizes), which "
                f"{'can' if told else 'cannot'} be told from nothing."
            )
    headings = ["model", "sizes", "FLOP", "bits/byte", "exponent", f"over {base}", "for 10x"]
    notes = [
        "Exponent: of FLOPs in bits per byte, with the 95% interval of the fit over sizes. Over "
        f"{base}: in the middle of the range, at the same size and FLOPs; for 10x: what ten times "
        "the FLOPs add to that, in percent too. Interval and law are of logarithms."
    ]
    section = Section("ours", f"{outcome.plan.scale.words}, {outcome.tokens} tokens seen", rows)
    table = TextTable(f"{outcome.plan.study.title}: power laws", headings, [section], notes)
    return table, sentences, {law.label: asdict(law) for law in laws}


def _in_percent(gap: Line) -> tuple[str, str]:
    """Of the ratio in the middle, and of what ten times the FLOPs multiply it by."""
    decade = math.log(10)
    return (
        _percent(gap.height, gap.height_interval),
        _percent(decade * gap.slope, decade * gap.slope_interval),
    )


def _percent(log: float, interval: float) -> str:
    """A ratio given by its logarithm, as what it differs from 1 by; to first order its interval."""
    return f"{100 * math.expm1(log):+.2f}% ± {100 * math.exp(log) * interval:.2f}%"
