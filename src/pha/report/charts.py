"""The figures of comparisons: seeds and studies, benchmarks, paired models."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from pha.report import plots
from pha.utils import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pha.evals.compare import BinDifference, Interval, PairedComparison

# How a seed is drawn.
_RING: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 4,
    "markerfacecolor": "none",
    "color": plots.MUTED,
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
    """A model in a plot against size."""

    label: str  # beside the point
    x: float  # parameters, or another cost
    values: Sequence[float]  # one for each seed, or a published one
    error: float | None = None  # half the height of its bar; None for none
    grey: bool = False  # a figure that does not compare
    place: float | None = None  # where it stands; the mean of its values where left out


@dataclass(frozen=True)
class Rate:
    """A series over a setting: place -> values of the seeds, and how many diverged there."""

    label: str
    values: Mapping[str, Sequence[float]]
    diverged: Mapping[str, int]


@dataclass(frozen=True)
class Fan:
    """A series of several seeds: place along the axis -> value, of each."""

    label: str
    seeds: Sequence[Mapping[str, float]]


@plots.styled()
def fans(panels: Sequence[tuple[str, Sequence[Fan]]], x_label: str, y_label: str) -> Figure:
    """A panel for each title, one above the other: thin lines for seeds, thick for their medians.

    Places that are numbers stand at their logarithms, zero half a step before the least of them;
    others stand side by side in the order in which they come.
    """
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(fan.label for _, series in panels for fan in series))
    rows = math.ceil(len(names) / 2)
    heights = [2.4 + 0.2 * rows, *[2.4] * (len(panels) - 1)]
    figure = plots.new_panels(len(panels), 1, heights)
    for axes, (title, series) in zip(figure.axes, panels, strict=True):
        words = dict.fromkeys(place for fan in series for seed in fan.seeds for place in seed)
        places = _places(list(words))
        for fan in series:
            style = plots.look(names.index(fan.label))
            for seed in fan.seeds:
                points = sorted((places[word], y) for word, y in seed.items())
                axes.plot(*zip(*points, strict=True), **style | {"marker": None}, lw=0.6, alpha=0.4)
            middle = [
                (x, float(np.median([seed[word] for seed in fan.seeds if word in seed])))
                for word, x in sorted(places.items(), key=lambda each: each[1])
                if any(word in seed for seed in fan.seeds)
            ]
            if middle:
                axes.plot(*zip(*middle, strict=True), **style, lw=1.8)
        axes.set_xticks(list(places.values()), list(places))
        axes.set_title(title)
        plots.label_axes(axes, x_label if axes is figure.axes[-1] else "", y_label)
    handles = [Line2D([], [], **plots.look(index)) for index in range(len(names))]
    plots.add_legend(figure, handles, names)
    return figure


def _places(words: Sequence[str]) -> dict[str, float]:
    """Where words stand along an axis."""
    try:
        numbers = {word: float(word) for word in words}
    except ValueError:
        return {word: float(place) for place, word in enumerate(words)}
    least = min((x for x in numbers.values() if x > 0), default=1.0)
    return {word: math.log2(x if x > 0 else least / math.sqrt(2)) for word, x in numbers.items()}


@plots.styled()
def estimates(rows: Sequence[Estimate], x_label: str, reference: float | None = None) -> Figure:
    """Rows: seeds as open dots, means with 95% intervals, and a line at `reference`."""
    figure, axes = plots.new_figure(0.9 + 0.32 * len(rows))
    if reference is not None:
        axes.axvline(reference, color=plots.MUTED, linewidth=0.8)
    for place, row in enumerate(rows):
        axes.plot(row.values, [place] * len(row.values), **_RING)
        axes.errorbar(row.mean, place, xerr=row.interval, fmt="D", color=plots.series_color(0))
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    plots.label_axes(axes, x_label, "", grid="x")
    axes.margins(x=0.08)
    return figure


@plots.styled()
def against_size(
    panels: Sequence[tuple[str, Sequence[Point]]], y_label: str, cost: str = ""
) -> Figure:
    """A panel for each title and its points, one above the other.

    Points stand at their parameters, joined by a line; or at another `cost`, which has no order
    and is drawn in powers of ten.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    heights = [2.9 if len(points) < 8 else 4.8 for _, points in panels]
    figure = plots.new_panels(len(panels), 1, heights)
    for axes, (title, points) in zip(figure.axes, panels, strict=True):
        x_label = cost or "parameters"
        plots.label_axes(axes, x_label if axes is figure.axes[-1] else "", y_label)
        axes.set_title(title)
        if cost:
            axes.set_xscale("log")
            sizes = [point.x for _, points in panels for point in points]
            few = max(sizes) < 10 * min(sizes)  # numbers of one decade need marks between
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if few else (1,)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text.count(x)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g}M"))
        _draw_points(axes, points, join=not cost)
    return figure


def _draw_points(axes: Axes, points: Sequence[Point], join: bool) -> None:
    heights = [fmean(p.values) if p.place is None else p.place for p in points]
    places = sorted(
        ((p.x, y, p) for p, y in zip(points, heights, strict=True)), key=lambda place: place[:2]
    )
    blue = plots.series_color(0)
    if join and not any(point.grey for point in points):
        axes.plot([x for x, _, _ in places], [y for _, y, _ in places], linewidth=0.9, color=blue)
    for x, mean, point in places:
        shade = plots.MUTED if point.grey else blue
        fill = "none" if point.grey else shade
        axes.errorbar(x, mean, yerr=point.error, fmt="o", color=shade, markerfacecolor=fill)
        if len(point.values) > 1:
            axes.plot([x] * len(point.values), point.values, **_RING)
    axes.margins(x=0.2, y=0.15)
    _name_points(axes, places)


def _name_points(axes: Axes, places: Sequence[tuple[float, float, Point]]) -> None:
    """Names right or left of points, as near as covers no point, bar or other name.

    A name that had to move has a line to its point.
    """
    axes.autoscale_view()
    to_panel = axes.transData - axes.transAxes
    spots = []
    taken = []  # left, right, bottom and top in parts of the panel
    for x, mean, point in places:
        error = point.error or 0.0
        (across, bottom), (_, top) = to_panel.transform([(x, mean - error), (x, mean + error)])
        up = to_panel.transform((x, mean))[1]
        taken.append((across - 0.01, across + 0.01, min(bottom, up - 0.01), max(top, up + 0.01)))
        spots.append((across, up, point))
    for x, y, point in sorted(spots, key=lambda spot: spot[1]):
        color = plots.MUTED if point.grey else plots.series_color(0)
        style: dict[str, Any] = {"fontsize": 7.5, "va": "center", "color": color, "zorder": 4}
        name = axes.text(x, y, point.label, transform=axes.transAxes, **style)
        size = name.get_window_extent().transformed(axes.transAxes.inverted())
        half, step = size.height / 2, size.height / 4
        sides = [s for s in (x + 0.015, x - 0.015 - size.width) if -0.1 < s < 1.1 - size.width]
        left, middle = next(
            (side, y + move * step)
            for move in sorted(range(-400, 401), key=abs)
            for side in sides or [x + 0.015]
            if all(
                right <= side
                or side + size.width <= begin
                or top <= y + move * step - half
                or y + move * step + half <= bottom
                for begin, right, bottom, top in taken
            )
        )
        name.set_position((left, middle))
        taken.append((left - 0.02, left + size.width + 0.02, middle - half, middle + half))
        if abs(middle - y) > 2 * half:
            end = left if left > x else left + size.width
            line = {"color": color, "linewidth": 0.5, "transform": axes.transAxes}
            axes.plot([x, end], [y, middle], scalex=False, scaley=False, **line)


@plots.styled()
def over_settings(series: Sequence[Rate], x_label: str, y_label: str) -> Figure:
    """Means over a setting with a dot for every seed; a cross at the top where a run diverged."""
    places = list(dict.fromkeys(place for each in series for place in each.values))
    names = [each.label for each in series]
    figure, axes = plots.new_figure(2.9, legend=names)
    handles = []
    for index, each in enumerate(series):
        # Side by side, so that series of one place do not hide each other.
        shift = 0.5 * ((index + 0.5) / len(series) - 0.5)
        known = [(i + shift, each.values[p]) for i, p in enumerate(places) if each.values.get(p)]
        means = [math.fsum(values) / len(values) for _, values in known]
        handles += axes.plot([x for x, _ in known], means, **plots.look(index), linewidth=1.1)
        color = plots.series_color(index)
        for x, values in known:
            axes.plot([x] * len(values), values, "_", color=color, markersize=5)
        lost = [i + shift for i, place in enumerate(places) if each.diverged.get(place)]
        at_top = axes.get_xaxis_transform()
        axes.plot(lost, [0.985] * len(lost), "x", color=color, markersize=7, transform=at_top)
    if any(values for each in series for values in each.values.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.set_xticks(range(len(places)), places)
    axes.set_xlim(-0.5, len(places) - 0.5)
    plots.label_axes(axes, x_label, y_label)
    plots.add_legend(figure, handles, names)
    return figure


Lines = Mapping[str, Sequence[tuple[int, float, float, float]]]
"""Label -> (length, value, low, high) in the order of lengths."""

# Picture -> the rows' field, its unit, the name of the axis.
_SPEED_MEASURES = {
    "throughput": ("tokens_per_second", 1.0, "tokens/s"),
    "memory": ("peak_memory", 1e9, "peak memory (GB)"),
}


@plots.styled()
def over_lengths(
    lines: Lines, y_label: str, x_label: str = "tokens", from_zero: bool = True
) -> Figure:
    """Lines over length, or batch, in powers of two, with a bar from low to high.

    The axis begins at zero, or there is a line at it.
    """
    lengths = sorted({point[0] for points in lines.values() for point in points})
    figure, axes = plots.new_figure(2.9, legend=list(lines))
    handles = []
    for index, points in enumerate(lines.values()):
        x, y, low, high = (np.array(column) for column in zip(*points, strict=True))
        handles.append(axes.errorbar(x, y, yerr=[y - low, high - y], **plots.look(index)))
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    if from_zero:
        top = max(point[3] for points in lines.values() for point in points)
        axes.set_ylim(0, 1.06 * top)  # the highest mark in full
    else:
        axes.axhline(0, color=plots.MUTED, linewidth=0.8)
    plots.label_axes(axes, x_label, y_label)
    plots.add_legend(figure, handles, list(lines))
    return figure


def save_speed_plots(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write a picture for each mode, measure, precision, batch size and compiled or not.

    It is `MODE-MEASURE-PRECISION-bB[-compiled]`, in SVG and PNG, of the rows of `run_benchmark`
    that did not fail, where at least two lengths were measured; and `-tT` in place of `-bB`, over
    the batch, where at least two batches were.
    """
    groups: dict[tuple[str, str, str, str, int, bool], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["error"] is None:
            for axis, fixed in (("length", "batch"), ("batch", "length")):
                key = (row["mode"], axis, fixed, row["precision"], row[fixed], row["compiled"])
                groups.setdefault(key, []).append(row)
    written = []
    for (mode, axis, fixed, precision, size, compiled), group in groups.items():
        if len({row[axis] for row in group}) < 2:
            continue
        letter, x_label = {"length": ("B", "tokens"), "batch": ("T", "sequences")}[axis]
        for measure, (field, unit, label) in _SPEED_MEASURES.items():
            suffix = "-compiled" if compiled else ""
            stem = folder / f"{mode}-{measure}-{precision}-{letter.lower()}{size}{suffix}"
            title = f"{label} of {mode} against {axis}, {precision}, {fixed} {size}"
            lines = _by_label(group, field, unit, axis)
            figure = over_lengths(lines, f"{label}, {precision}, {letter} = {size}", x_label)
            written += plots.save_picture(figure, stem, title)
    return written


def _by_label(rows: Sequence[Mapping[str, Any]], field: str, unit: float, axis: str) -> Lines:
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for row in rows:
        value = row[field]
        if not isinstance(value, Mapping):
            value = dict.fromkeys(("median", "low", "high"), value)
        middle, low, high = (value[name] / unit for name in ("median", "low", "high"))
        label = f"{row['model']} {row['backend']}".strip()
        lines.setdefault(label, []).append((row[axis], middle, low, high))
    return {label: sorted(points) for label, points in lines.items()}


_LINE = 100
_SIDES = "← A better        loss of A − loss of B (nats per token)        B better →"
# Colour, marker and its fill for A better, undecided and B better.
_LOOKS = {
    -1: (plots.series_color(0), "o", plots.series_color(0)),
    0: (plots.MUTED, "D", plots.LIGHT["paper"]),
    1: (plots.series_color(1), "s", plots.series_color(1)),
}


@plots.styled()
def paired_figure(comparison: PairedComparison) -> Figure:
    """Distribution of the block differences, and the mean difference in each bin, with 95% bars."""
    rows = math.ceil((1 + len(comparison.breakdowns)) / 2)
    figure = plots.new_panels(rows, 2, [3.0] * rows, width=7.6)
    blocks, *panels = figure.axes
    _draw_blocks(blocks, comparison)
    drawn = list(zip(panels, comparison.breakdowns.items(), strict=False))
    for axes, (name, bins) in drawn:
        _draw_bins(axes, name, bins)
    for axes in panels[len(drawn) :]:
        axes.remove()
    # The same horizontal axis for all bins, zero included, so that bars compare between panels.
    ends = [0.0, *(end for axes, _ in drawn for end in axes.get_xlim())]
    margin = 0.04 * (max(ends) - min(ends))
    for axes, _ in drawn:
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
    for axes in figure.axes:
        axes.axvline(0, color=plots.MUTED, linewidth=0.8, zorder=1)
        axes.tick_params(labelsize=8.5)
    figure.supxlabel(_SIDES, fontsize=9.5, color=plots.MUTED)
    names = f"A: {text.shorten(comparison.a, 40)}     B: {text.shorten(comparison.b, 40)}"
    remarks = [comparison.verdict(), comparison.caution(), names]
    lines = [textwrap.fill(remark, _LINE) for remark in remarks if remark]
    figure.suptitle("\n".join(lines), fontsize=9.5, x=0.02, ha="left")
    return figure


def describe(comparison: PairedComparison) -> str:
    """What the picture shows, in words."""
    bins = "; ".join(
        f"by {name}: " + ", ".join(f"{b.label} {b.difference.mean:+.3f}" for b in entries)
        for name, entries in comparison.breakdowns.items()
    )
    return (
        f"A is {comparison.a}, B is {comparison.b}. {comparison.verdict()}. "
        f"{comparison.caution() or ''} Mean difference {bins}."
    )


def _draw_blocks(axes: Axes, comparison: PairedComparison) -> None:
    """Histogram of the block means, with the overall mean and its interval above it."""
    differences, overall = comparison.block_differences, comparison.difference
    reach = float(np.abs(differences).max()) or 1e-3
    # An edge at zero, so that every bar is on one side.
    width = reach / min(12, max(6, round(len(differences) ** 0.5)))
    low = int(np.floor(differences.min() / width))
    high = max(low + 1, int(np.ceil(differences.max() / width)))
    edges = np.arange(low, high + 1) * width
    counts, _ = np.histogram(differences, edges)
    colors = [_LOOKS[-1 if end <= 0 else 1][0] for end in edges[1:]]
    axes.bar(edges[:-1], counts, width * 0.94, align="edge", color=colors, alpha=0.55, zorder=2)
    _draw_interval(axes, overall, counts.max() * 1.12)
    axes.set_ylim(0, counts.max() * 1.22)
    axes.set_ylabel("blocks", fontsize=8.5)
    axes.set_title(f"{overall.blocks} blocks of {comparison.block_tokens:,} tokens, their mean")
    axes.margins(x=0.08)
    lowest, highest = axes.get_xlim()
    axes.set_xlim(min(lowest, -0.15 * reach), max(highest, 0.15 * reach))


def _draw_bins(axes: Axes, name: str, bins: Sequence[BinDifference]) -> None:
    """One row for each bin that has an interval, the first on top."""
    bins = [entry for entry in bins if entry.difference.half_width is not None]
    for row, entry in enumerate(bins):
        _draw_interval(axes, entry.difference, row)
    axes.set_yticks(range(len(bins)), [f"{entry.label}  ({entry.share:.0%})" for entry in bins])
    axes.set_ylim(len(bins) - 0.4, -0.6)
    axes.set_title(f"by {name}")
    plots.label_axes(axes, "", "")


def _draw_interval(axes: Axes, difference: Interval, y: float) -> None:
    color, marker, fill = _LOOKS[difference.sign]
    style: dict[str, Any] = {"fmt": marker, "color": color, "markerfacecolor": fill, "zorder": 3}
    axes.errorbar(difference.mean, y, xerr=difference.half_width, **style)
