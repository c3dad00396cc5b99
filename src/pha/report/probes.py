"""Tables and pictures of probes, for models side by side and for seeds of variants alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pha.evals.compare import Interval
from pha.evals.probes.reading import Panel, Readings, estimate
from pha.report import plots
from pha.report.tables import Section, TextTable
from pha.utils.text import DASH, fixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Estimates = dict[str, Interval]
"""Label of a point -> mean and interval, in the order of the points."""

_NOTE = (
    "± is half of a 95% interval, over blocks of text or, where there are several, over seeds; "
    "* where it leaves zero out. Each stands for itself: of twenty, one leaves zero out by chance."
)


def panels_of(readings: Readings) -> list[Panel]:
    """The panels that all readings share, each with the points of all, those of most first."""
    every = [reading for of_model in readings.values() for reading in of_model]
    found = []
    for panels in zip(*(reading.panels for reading in every), strict=True):
        most = max(panels, key=lambda panel: len(panel.points))
        points = {point.label: point for panel in (most, *panels) for point in panel.points}
        found.append(replace(most, points=list(points.values())))
    return found


def estimates(
    readings: Readings, number: int, model: str, less: str | None = None, than: str | None = None
) -> Estimates:
    """What a model has at each point of a panel, as it is or less something; see `estimate`.

    `less` is the label of a point of the same model, `than` the name of another model.
    """
    other = None if than is None else readings[than]
    found = {
        point.label: estimate(readings[model], number, point.label, less=less, than=other)
        for point in panels_of(readings)[number].points
    }
    return {label: value for label, value in found.items() if value is not None}


def probe_tables(readings: Readings) -> list[TextTable]:
    """A table for each panel that is no heat map: means, and differences from the first model."""
    first, *others = readings
    tables = []
    for number, panel in enumerate(panels_of(readings)):
        if panel.second or not panel.points:
            continue
        columns = [(name, estimates(readings, number, name)) for name in readings]
        contrasts = [
            (f"{name} - {first}", estimates(readings, number, name, than=first)) for name in others
        ]
        if panel.reference is not None and not others:
            less = estimates(readings, number, first, less=panel.reference)
            contrasts = [(f"less that at {panel.reference}", less)]
        tokens = {k: v.tokens for _, every in reversed(columns) for k, v in every.items()}
        rows = [
            [
                point.label,
                fixed(tokens.get(point.label), 0),
                *(_show(values.get(point.label)) for _, values in columns),
                *(_show(values.get(point.label), signed=True) for _, values in contrasts),
            ]
            for point in panel.points
        ]
        headings = [panel.axis or "tokens that are", "tokens", *(n for n, _ in columns + contrasts)]
        notes = [_NOTE] if number == 0 else []
        if panel.chance:
            notes.append(f"Knowing nothing gives {panel.chance:.3f}.")
        title = f"{panel.title} ({panel.measure})"
        tables.append(TextTable(title, headings, [Section("", "", rows)], notes))
    return tables


def _show(value: Interval | None, signed: bool = False) -> str:
    if value is None:
        return DASH
    shown = f"{value.mean:{'+' if signed else ''}.3f}"
    star = " *" if signed and value.sign else ""
    return shown if value.half_width is None else f"{shown} ± {value.half_width:.3f}{star}"


def probe_record(readings: Readings) -> list[dict[str, Any]]:
    """The panels with means, intervals and differences from the first model, for JSON."""
    first, *others = readings

    def plain(found: Estimates) -> dict[str, Any]:
        return {label: asdict(value) for label, value in found.items()}

    return [
        {
            **{key: getattr(panel, key) for key in ("title", "measure", "axis", "second")},
            **{key: getattr(panel, key) for key in ("reference", "chance")},
            "places": {p.label: [p.x, p.y] for p in panel.points},
            "means": {name: plain(estimates(readings, number, name)) for name in readings},
            "less_reference": {
                name: plain(estimates(readings, number, name, less=panel.reference))
                for name in (readings if panel.reference is not None else ())
            },
            "less_first": {
                name: plain(estimates(readings, number, name, than=first)) for name in others
            },
        }
        for number, panel in enumerate(panels_of(readings))
    ]


def save_probe(readings: Readings, stem: Path, about: str) -> list[Path]:
    """Write the pictures of a probe: `stem`.svg and .png, and `stem`-map.* of a heat map."""
    panels = panels_of(readings)
    title = f"{about}: {'; '.join(panel.title for panel in panels)}"
    written = plots.save_picture(_curves(readings), stem, title)
    for number, panel in enumerate(panels):
        if panel.second:
            figure = _maps(readings, number, panel)
            written += plots.save_picture(figure, stem.with_name(f"{stem.name}-map"), panel.title)
    return written


@plots.styled()
def _curves(readings: Readings) -> Figure:
    """The panels, a series for each model.

    A panel with a reference is drawn less that, and one without an axis, of several models, less
    the first model.
    """
    first, *others = readings
    jobs: list[tuple[Panel, str, dict[str, Estimates]]] = []

    for number, panel in enumerate(panels_of(readings)):
        if panel.second or not panel.points:
            continue
        kinds: list[tuple[str, str | None, str | None]] = []
        if panel.axis or not others:
            kinds.append((panel.measure, None, None))
        if panel.reference is not None:
            kinds.append((f"{panel.measure}, less at {panel.reference}", panel.reference, None))
        if not panel.axis and others:
            kinds.append((f"{panel.measure}, less {first}", None, first))
        for measure, less, than in kinds:
            shown = [name for name in readings if name != than]
            found = {name: estimates(readings, number, name, less, than) for name in shown}
            jobs.append((panel, measure, found))
    columns = min(2, len(jobs))
    rows = math.ceil(len(jobs) / columns)
    figure = plots.new_panels(rows, columns, [3.0] * rows, width=3.9 * columns + 0.6)
    colors = {name: index for index, name in enumerate(readings)}
    handles: dict[str, Any] = {}
    for axes, (panel, measure, found) in zip(figure.axes, jobs, strict=False):
        axes.set_title(panel.title, fontsize=9)
        zero = 0.0 if "less" in measure else panel.chance
        if zero is not None:
            line = axes.axhline if panel.axis else axes.axvline
            line(zero, color=plots.MUTED, linewidth=0.8)
        handles |= _draw(axes, panel, measure, found, colors)
        axes.tick_params(labelsize=8)
    for axes in figure.axes[len(jobs) :]:
        axes.remove()
    names = [name for name in readings if name in handles]
    plots.add_legend(figure, [handles[name] for name in names], names)
    return figure


def _draw(
    axes: Axes,
    panel: Panel,
    measure: str,
    found: Mapping[str, Estimates],
    colors: Mapping[str, int],
) -> dict[str, Any]:
    """Lines over an axis in powers of two; or a row for each point, the models below each other."""
    lines, handles = bool(panel.axis), {}
    places = {p.label: float(p.x or 0.0) if lines else row for row, p in enumerate(panel.points)}
    for number, (name, every) in enumerate(found.items()):
        values = _with_interval(every)
        at, means = [places[label] for label in values], [v.mean for v in values.values()]
        bars = [v.half_width or 0.0 for v in values.values()]
        style = plots.look(colors[name]) | {"markersize": 3.5}
        if lines:
            style |= {"elinewidth": 0.8, "capsize": 1.5}
            handles[name] = axes.errorbar(at, means, yerr=bars, **style)
        else:
            shift = 0.6 * ((number + 0.5) / len(found) - 0.5)
            rows = [row + shift for row in at]
            style |= {"linestyle": "none"}
            handles[name] = axes.errorbar(means, rows, xerr=bars, **style)
    if lines:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        shown = list(places)[:: math.ceil(len(places) / 8)]
        names = [label.split("\u2013")[-1].replace(",", "") for label in shown]
        axes.set_xticks([places[label] for label in shown], list(map(_short, names)))
        plots.label_axes(axes, panel.axis, measure)
    else:
        axes.set_yticks(range(len(places)), list(places))
        axes.set_ylim(len(places) - 0.4, -0.6)
        plots.label_axes(axes, measure, "", grid="x")
    return handles


def _with_interval(found: Estimates) -> Estimates:
    """What has an interval; all where nothing has."""
    return {label: v for label, v in found.items() if v.half_width is not None} or found


def _short(number: str) -> str:
    """`16384` as `16k`: powers of two in their own thousands."""
    value = int(number)
    return f"{value >> 10}k" if value >= 1024 and value % 1024 == 0 else number


@plots.styled()
def _maps(readings: Readings, number: int, panel: Panel) -> Figure:
    """A heat map for each model, all on one scale of colours."""
    found = {name: estimates(readings, number, name) for name in readings}
    reach = max((abs(v.mean) for each in found.values() for v in each.values()), default=1.0) or 1.0
    columns = sorted({float(point.x or 0.0) for point in panel.points})
    depths = sorted({float(point.y or 0.0) for point in panel.points})
    wide = min(2, len(found))
    high = math.ceil(len(found) / wide)
    figure = plots.new_panels(high, wide, [3.0] * high, width=3.9 * wide + 0.9)
    for axes, (name, values) in zip(figure.axes, found.items(), strict=False):
        grid = np.full((len(depths), len(columns)), math.nan)
        for point in panel.points:
            if point.label in values:
                row, column = depths.index(point.y or 0.0), columns.index(point.x or 0.0)
                grid[row, column] = values[point.label].mean
        image = axes.imshow(grid, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if math.isfinite(value):
                ink = "white" if abs(value) > 0.6 * reach else "black"
                shown = f"{value:.{1 if reach >= 1 else 2}f}"
                axes.text(column, row, shown, ha="center", va="center", fontsize=7, color=ink)
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(columns)), [_short(f"{x:.0f}") for x in columns])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        plots.label_axes(axes, panel.axis, panel.second)
        axes.grid(visible=False)
    for axes in figure.axes[len(found) :]:
        axes.remove()
    figure.colorbar(image, ax=figure.axes, label=f"{panel.title}, {panel.measure}")
    return figure
