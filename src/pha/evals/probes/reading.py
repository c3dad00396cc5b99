"""What a probe finds of one model, in a form that models, seeds and pictures share.

A point is a mean over blocks of text: sum S_j and weight n_j in block j, and m = sum S_j / sum n_j.
The weights are counts of tokens, or what the sum is a part of, as in a ratio. To first order m
moves by the sum over blocks of

    e_j = (S_j - m n_j) / sum n

so a point has the standard error sqrt(k/(k-1) sum e_j^2) of a ratio estimator, as in
`pha.evals.compare`. The difference of two points on the same text, of one model or two, has that of
the differences of their e_j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pha.data.store import TokenStore
from pha.evals.compare import MIN_BLOCKS, Interval
from pha.utils.errors import PHAError

Progress = Callable[[int, int], None]
"""Is called with how many steps are done, and how many there are in all."""

HORIZON = 64
"""Longest context that probes look at unless told otherwise, in trained lengths."""


@dataclass(frozen=True)
class Point:
    """A mean over blocks.

    Attributes:
        label: what it is of, the same for every model.
        tokens: how many it is over.
        sums: (blocks,) S_j.
        weights: (blocks,) n_j.
        x: its place on the panel's axis; None where there is no axis.
        y: the same on a second axis, of a heat map.
    """

    label: str
    tokens: int
    sums: list[float]
    weights: list[float]
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Panel:
    """Points that belong in one picture.

    Attributes:
        title: what is shown.
        measure: what the points are means of, with the unit.
        points: in order.
        axis: what x is; empty where points have no place.
        second: what y is, of a heat map.
        reference: label of the point that the others are set against, if any is.
        chance: value that knows nothing, where there is one.
    """

    title: str
    measure: str
    points: list[Point]
    axis: str = ""
    second: str = ""
    reference: str | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Reading:
    """What one probe finds of one model.

    Attributes:
        probe: its name.
        protocol: what it was asked of, lengths, data and precision.
        panels: always the same ones, in the same order.
    """

    probe: str
    protocol: dict[str, Any]
    panels: list[Panel]


@dataclass(frozen=True)
class Question:
    """What probes ask a model about.

    Attributes:
        store: tokens made by the model's tokenizer.
        split: of the store.
        trained: T, tokens of a sequence in training.
        length: longest context; `HORIZON` trained lengths, or what there is, when None.
        max_tokens: only so many tokens of the split.
        precision: fp32, or bf16 for autocast.
        piece: tokens per forward pass; longer rows go through in pieces, with the cache.
        longest: tokens that the models can read at most, where positions are learned.
    """

    store: TokenStore
    split: str = "test"
    trained: int = 1024
    length: int | None = None
    max_tokens: int | None = None
    precision: str = "fp32"
    piece: int = 2048
    longest: int | None = None

    def tokens(self) -> np.ndarray:
        """The ids that are read, (N,)."""
        return np.asarray(self.store.tokens(self.split)[: self.max_tokens])

    def reach(self, room: int, beside: int = 0) -> int:
        """The longest context: as asked for, else what text and models have room for.

        Args:
            room: tokens of context that the text has room for.
            beside: tokens that stand in a row besides the context.

        Raises:
            PHAError: a length below 2, or one that the text has no room for.
        """
        if self.length is None:
            models = room if self.longest is None else self.longest - beside
            return min(HORIZON * self.trained, room, models)
        if not 2 <= self.length <= room:
            raise PHAError(
                f"the length is {self.length:,}; for this probe the {self.split} split gives room "
                f"for 2 to {room:,} tokens"
            )
        return self.length

    def protocol(self, **more: Any) -> dict[str, Any]:
        """The question as data, for a reading to carry."""
        return {
            "split": self.split,
            "data_sha256": self.store.sha256,
            "trained_length": self.trained,
            "max_tokens": self.max_tokens,
            "precision": self.precision,
            "documents": "document boundaries ignored",
            **more,
        }


def stage(progress: Progress | None, number: int, stages: int) -> Progress | None:
    """The progress of one of several stages, each as long as the others."""
    if progress is None:
        return None
    shown = progress
    return lambda done, total: shown(number * total + done, stages * total)


def points_of(
    values: np.ndarray,
    members: np.ndarray,
    labels: Sequence[str],
    blocks: np.ndarray,
    weights: np.ndarray | None = None,
    places: Sequence[float] | None = None,
) -> list[Point]:
    """A point for each bin that has values.

    Args:
        values: (N,) to be averaged.
        members: (N,) the bin of each; below zero for none.
        labels: of the bins.
        blocks: (N,) the block of each.
        weights: (N,) what each value is a part of; 1 when absent.
        places: x of the bins.
    """
    count = int(blocks.max(initial=-1)) + 1
    found = []
    for number, label in enumerate(labels):
        here = members == number
        if here.any():
            sums = np.bincount(blocks[here], values[here].astype(np.float64), count)
            of = None if weights is None else weights[here].astype(np.float64)
            totals = np.bincount(blocks[here], of, count).astype(np.float64)
            x = None if places is None else float(places[number])
            found.append(Point(label, int(here.sum()), sums.tolist(), totals.tolist(), x))
    return found


def contrast(a: Point, b: Point | None = None) -> Interval:
    """The mean of a point, or less that of another one on the same blocks, with its interval."""
    from scipy import stats

    mean, influence, used = _influence(a)
    blocks = int(used.sum())
    if b is not None:
        other, theirs, also = _influence(b)
        blocks = min(blocks, int(also.sum()))
        mean, influence, used = mean - other, influence - theirs, used | also
    if blocks < MIN_BLOCKS:
        return Interval(mean, None, blocks, a.tokens)
    k = int(used.sum())
    error = math.sqrt(k / (k - 1) * float((influence**2).sum()))
    return Interval(mean, float(stats.t.ppf(0.975, blocks - 1)) * error, blocks, a.tokens)


def _influence(point: Point) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean, e_j of every block, and which blocks have any."""
    sums, weights = np.array(point.sums), np.array(point.weights)
    total = math.fsum(weights)
    mean = math.fsum(sums) / total
    return mean, (sums - mean * weights) / total, weights > 0


def over_seeds(intervals: Sequence[Interval]) -> Interval:
    """The mean over seeds with Student's interval; of one seed its own interval, over text."""
    from scipy import stats

    if len(intervals) == 1:
        return intervals[0]
    means = [each.mean for each in intervals]
    half = float(stats.t.ppf(0.975, len(means) - 1) * stats.sem(means))
    return Interval(math.fsum(means) / len(means), half, len(means), intervals[0].tokens)


Readings = Mapping[str, Sequence[Reading]]
"""Name of a model -> what a probe found of it, one for each seed."""


def estimate(
    readings: Sequence[Reading],
    panel: int,
    label: str,
    *,
    less: str | None = None,
    than: Sequence[Reading] | None = None,
) -> Interval | None:
    """Mean over seeds of a point; None where not every seed has it.

    Args:
        readings: of a model, one for each seed.
        panel: which panel.
        label: of the point.
        less: label of a point of the same panel that is taken off.
        than: of another model, whose point is taken off seed by seed.
    """
    found = []
    for i, reading in enumerate(readings):
        one = _point(reading, panel, label)
        two = None
        if less is not None:
            two = _point(reading, panel, less)
        elif than is not None:
            two = _point(than[i], panel, label)
        if one is None or (two is None and (less is not None or than is not None)):
            return None
        if two is not None and len(two.sums) != len(one.sums):
            raise PHAError("the models were not asked the same: give both the same data and length")
        found.append(contrast(one, two))
    return over_seeds(found) if found else None


def _point(reading: Reading, panel: int, label: str) -> Point | None:
    return next((p for p in reading.panels[panel].points if p.label == label), None)
