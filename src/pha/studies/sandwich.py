"""Shares of the branches over layers: are they settled, and do they make a sandwich?

The paper reads Table 9 as a sandwich: GSS leads at both ends of the stack, attention rises in the
middle. Here that is a contrast, the mean share in the outer layers minus that in the inner ones,
tested two ways: over seeds (Student's t), and within one model over all ways to choose the outer
layers (an exact permutation test, whose p can be no smaller than one over their number).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pha.studies.seeds import LEVEL, Summary, p_of_mean, summarise

LAST = 5  # checkpoints over which shares must be settled

Layers = Sequence[dict[str, float]]
Sign = Literal["positive", "negative"]


@dataclass(frozen=True)
class Contrast:
    """Outer minus inner layers, of one branch.

    Attributes:
        branch: name.
        expected: what a sandwich predicts of the sign.
        points: percentage points for each seed.
        summary: over seeds.
        p_seeds: two-sided, that the mean over seeds is zero; None for one seed.
        p_layers: two-sided, of the mean over seeds, over the ways to choose the outer layers.
        smallest_p_layers: the smallest value that this test can give with so many layers.
    """

    branch: str
    expected: Sign
    points: tuple[float, ...]
    summary: Summary
    p_seeds: float | None
    p_layers: float
    smallest_p_layers: float

    @property
    def verdict(self) -> Literal["holds", "against", "undecided"]:
        """What the test over seeds says; with one seed, the one over layers."""
        p = self.p_layers if self.p_seeds is None else self.p_seeds
        if p >= LEVEL:
            return "undecided"
        return "holds" if (self.summary.mean > 0) == (self.expected == "positive") else "against"

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return asdict(self) | {"verdict": self.verdict}


def outer_layers(layers: int) -> frozenset[int]:
    """A quarter of the layers, at least one, at either end.

    >>> sorted(outer_layers(10))
    [0, 1, 8, 9]
    """
    each = max(1, layers // 4)
    return frozenset([*range(each), *range(layers - each, layers)])


def sandwich(models: Sequence[Layers], branch: str, expected: Sign) -> Contrast | None:
    """Test the shares of a branch; None where a stack has fewer than four layers that mix it.

    Args:
        models: for each seed the layers' shares, from 0 to 1.
        branch: name.
        expected: the sign of outer minus inner in a sandwich.
    """
    from scipy import stats

    shares = [[100 * layer[branch] for layer in layers if branch in layer] for layers in models]
    count = len(shares[0])
    if any(len(row) != count for row in shares) or count < 4:
        return None
    by_seed = np.array(shares)
    outer = np.isin(np.arange(count), list(outer_layers(count)))
    points = by_seed[:, outer].mean(1) - by_seed[:, ~outer].mean(1)
    mean = by_seed.mean(0)
    p_layers = stats.permutation_test(
        (mean[outer], mean[~outer]),
        lambda outside, inside, axis: np.abs(outside.mean(axis) - inside.mean(axis)),
        alternative="greater",  # of the absolute value: two-sided
        n_resamples=math.inf,  # all of them: exact
        batch=10_000,
    ).pvalue
    # Where half of the layers are outer ones, choosing the other half is as far from even.
    smallest = (2 if 2 * outer.sum() == count else 1) / math.comb(count, int(outer.sum()))
    return Contrast(
        branch,
        expected,
        tuple(points.tolist()),
        summarise(points.tolist()),
        p_of_mean(points.tolist()),
        float(p_layers),
        smallest,
    )


def settled(history: Sequence[Layers], branch: str) -> float:
    """How far the share of a branch moved over the last checkpoints: the largest range of a layer.

    Args:
        history: layers' shares at successive checkpoints, from 0 to 1.
        branch: name.

    Returns:
        Percentage points.
    """
    last = history[-LAST:]
    ranges = [
        max(layers[i][branch] for layers in last) - min(layers[i][branch] for layers in last)
        for i in range(len(last[0]))
        if branch in last[0][i]
    ]
    return 100 * max(ranges, default=0.0)


def tell(contrast: Contrast, who: str) -> str:
    """What the test says, in a sentence."""
    summary = contrast.summary
    what = f"{contrast.branch} has {abs(summary.mean):.1f}"
    if summary.interval is not None:
        what += f" ± {summary.interval:.1f}"
    side = "more" if summary.mean > 0 else "less"
    text = f"{who}: {what} points {side} share in the outer layers than in the inner ones"
    tests = f"p = {contrast.p_layers:.3f} over layers, at least {contrast.smallest_p_layers:.3f}"
    if contrast.p_seeds is not None:
        tests = f"95% interval and p = {contrast.p_seeds:.3f} over {summary.n} seeds; {tests}"
    verdict = {
        "holds": "which supports the sandwich",
        "against": "which speaks against the sandwich",
        "undecided": "which decides nothing",
    }[contrast.verdict]
    return f"{text}, {verdict} ({tests})."
