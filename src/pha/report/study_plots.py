"""Figures of studies: a dot for every seed, intervals, sizes, rates; published figures apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pha.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# How a seed is drawn.
_RING: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 4,
    "markerfacecolor": "none",
    "color": plots.LIGHT["muted"],
}


@dataclass(frozen=True)
class Estimate:
    """A row of a plot: values of seeds, their mean and the half width of its 95% interval."""

    label: str
    values: Sequence[float]
    mean: float
    interval: float | None


@dataclass(frozen=True)
class Point:
    """A model in a plot against size.

    Attributes:
        label: beside the point.
        x: parameters.
        values: one for each seed, or a published one.
        error: half the height of its bar; None for none.
        grey: a figure that does not compare.
    """

    label: str
    x: float
    values: Sequence[float]
    error: float | None = None
    grey: bool = False


@dataclass(frozen=True)
class Rate:
    """A series over a setting: place -> values of the seeds, and how many diverged there."""

    label: str
    values: Mapping[str, Sequence[float]]
    diverged: Mapping[str, int]


def estimates(rows: Sequence[Estimate], x_label: str, reference: float | None = None) -> Figure:
    """Rows: seeds as open dots, means with 95% intervals, and a line at `reference`."""
    with plots.styled():
        figure, axes = plots.new_figure(0.9 + 0.32 * len(rows))
        if reference is not None:
            axes.axvline(reference, color=plots.LIGHT["muted"], linewidth=0.8)
        for place, row in enumerate(rows):
            axes.plot(row.values, [place] * len(row.values), **_RING)
            axes.errorbar(
                row.mean,
                place,
                xerr=row.interval,
                fmt="D",
                markersize=5,
                capsize=3,
                linewidth=1.2,
                color=plots.series_color(0),
            )
        axes.set_yticks(range(len(rows)), [row.label for row in rows], parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(x_label, parse_math=False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.margins(x=0.08)
        return figure


def against_parameters(panels: Sequence[tuple[str, Sequence[Point]]], y_label: str) -> Figure:
    """A panel for each source, one above the other; models that do not compare in hollow grey.

    Args:
        panels: title and points.
        y_label: of all panels.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with plots.styled():
        heights = [2.9 if len(points) < 8 else 4.8 for _, points in panels]
        figure = Figure(figsize=(5.0, sum(heights)), layout="constrained")
        figure.patch.set_visible(False)
        rows = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axes, (title, points) in zip(rows[:, 0], panels, strict=True):
            _size_panel(axes, points)
            axes.set_title(title, fontsize=10, loc="left", parse_math=False)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g}M"))
            axes.set_ylabel(y_label, parse_math=False)
        axes.set_xlabel("parameters")
        return figure


def _size_panel(axes: Axes, points: Sequence[Point]) -> None:
    color = plots.series_color(0)
    means = [math.fsum(point.values) / len(point.values) for point in points]
    beside_line = not any(point.grey for point in points)
    if beside_line:
        line = sorted((point.x, mean) for point, mean in zip(points, means, strict=True))
        axes.plot([x for x, _ in line], [y for _, y in line], linewidth=0.9, color=color)
    for point, mean in zip(points, means, strict=True):
        shade = plots.LIGHT["muted"] if point.grey else color
        fill = "none" if point.grey else shade
        axes.errorbar(point.x, mean, yerr=point.error, fmt="none", ecolor=shade, capsize=3)
        if len(point.values) > 1:
            axes.plot([point.x] * len(point.values), point.values, **_RING)
        axes.plot(point.x, mean, "o", color=shade, markerfacecolor=fill, markersize=4.5)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.margins(x=0.2, y=0.15)
    _label_points(axes, points, means, beside_line)


def _label_points(
    axes: Axes, points: Sequence[Point], means: Sequence[float], beside_line: bool
) -> None:
    """Names beside points, each moved up from the lowest until it covers no other.

    Beside a line they stand off from it: below where it rises on their side, else above.
    """
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    # Of a line and a character, in parts of the panel.
    height, letter = (0.056 if len(points) < 8 else 0.032), 0.0165
    taken: list[tuple[float, float, float]] = []
    by_size = dict(sorted(zip((point.x for point in points), means, strict=True)))
    for point, mean in sorted(zip(points, means, strict=True), key=lambda pair: pair[1]):
        x = (point.x - x_low) / (x_high - x_low)
        y = (mean - y_low) / (y_high - y_low)
        width = letter * len(point.label)
        left = x + 0.015 if x + width < 1.05 else x - 0.015 - width
        start_at = y
        if beside_line:
            if left > x:
                side = [other for size, other in by_size.items() if size > point.x][:1]
            else:
                side = [other for size, other in by_size.items() if size < point.x][-1:]
            rises = any(other > mean for other in side)
            start_at += -0.7 * height if rises else 0.7 * height
        place = start_at
        while any(
            left < right and start < left + width and abs(place - other) < height
            for start, right, other in taken
        ):
            place += height / 4
        taken.append((left, left + width, place))
        if place > start_at:
            end = left if left > x else left + width
            axes.plot(
                [x, end],
                [y, place],
                color=plots.LIGHT["grid"],
                linewidth=0.7,
                transform=axes.transAxes,
                zorder=1,
            )
        axes.text(
            left,
            place,
            point.label,
            transform=axes.transAxes,
            fontsize=7.5,
            va="center",
            color=plots.LIGHT["muted"] if point.grey else plots.series_color(0),
            parse_math=False,
        )


def over_settings(series: Sequence[Rate], x_label: str, y_label: str) -> Figure:
    """Means over a setting with a dot for every seed; a cross at the top where a run diverged."""
    places = list(dict.fromkeys(place for each in series for place in each.values))
    with plots.styled():
        figure, axes = plots.new_figure(2.9 + 0.2 * math.ceil(len(series) / 2))
        handles = []
        for index, each in enumerate(series):
            color = plots.series_color(index)
            dash = plots.DASHES[index // plots.SERIES_COUNT % len(plots.DASHES)]
            marker = plots.MARKERS[index % plots.SERIES_COUNT][0]
            # Side by side, so that series of one place do not hide each other.
            shift = 0.5 * ((index + 0.5) / len(series) - 0.5)
            known = [(i + shift, each.values[p]) for i, p in enumerate(places) if each.values[p]]
            handles += axes.plot(
                [x for x, _ in known],
                [math.fsum(values) / len(values) for _, values in known],
                color=color,
                linestyle=dash,
                linewidth=1.1,
                marker=marker,
                markersize=4.5,
                label=each.label,
            )
            for x, values in known:
                axes.plot([x] * len(values), values, "_", color=color, markersize=5)
            lost = [i + shift for i, place in enumerate(places) if each.diverged.get(place)]
            axes.plot(
                lost,
                [0.985] * len(lost),
                "x",
                color=color,
                markersize=7,
                transform=axes.get_xaxis_transform(),
            )
        if any(values for each in series for values in each.values.values()):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.tick_params(axis="y", which="minor", labelsize=8)
        axes.set_xticks(range(len(places)), places)
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel(x_label, parse_math=False)
        axes.set_ylabel(y_label, parse_math=False)
        axes.grid(axis="y")
        if len(series) > 1:
            figure.legend(
                handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=8.5
            )
        return figure
