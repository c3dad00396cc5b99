"""Dot plots of a measure over settings: a dot for every seed, a line through the means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pha.report import plots
from pha.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Dots:
    """A series: values by place on the horizontal axis, a value for each seed.

    Places that are all numbers are put on a number line, in powers of ten where they span more
    than a factor of five; others side by side.
    """

    label: str
    values: Mapping[str, Sequence[float]]


def dot_plot(series: Sequence[Dots], x_label: str, y_label: str) -> Figure:
    """Draw series over their places."""
    places = list(dict.fromkeys(place for dots in series for place in dots.values))
    numbers = [number for place in places if (number := _number(place)) is not None]
    numeric = len(numbers) == len(places) > 1
    at: dict[str, float] = dict(
        zip(places, numbers if numeric else range(len(places)), strict=True)
    )
    with plots.styled():
        figure, axes = plots.new_figure(2.9 + (0.2 * len(series) if len(series) > 1 else 0))
        for index, dots in enumerate(series):
            means = sorted((at[p], math.fsum(v) / len(v)) for p, v in dots.values.items())
            color = plots.series_color(index)
            marker = plots.MARKERS[index % plots.SERIES_COUNT][0]
            style = "-" if numeric else "none"
            axes.plot(
                [x for x, _ in means],
                [y for _, y in means],
                linestyle=style,
                color=color,
                linewidth=1.2,
                label=dots.label,
            )
            for place, values in dots.values.items():
                axes.plot([at[place]] * len(values), values, marker, color=color, markersize=4.5)
        if numeric:
            low, high = min(at.values()), max(at.values())
            if low > 0 and high / low > 5:
                axes.set_xscale("log")
                axes.minorticks_off()
        axes.set_xticks(list(at.values()), list(at))
        if not numeric:
            axes.set_xlim(-0.6, len(places) - 0.4)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        axes.margins(y=0.12)
        if len(series) > 1:
            figure.legend(loc="outside upper left", frameon=False)
        return figure


def save_picture(figure: Figure, stem: Path, title: str) -> list[Path]:
    """Write a figure as `stem`.svg and `stem`.png (on white, 200 dots per inch).

    Args:
        figure: from this module or `pha.report.plots`.
        stem: path without suffix.
        title: what is seen, in words, for those who do not see it.
    """
    svg, png = stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")
    write_text(svg, plots.to_svg(figure, title) + "\n")
    temporary = png.with_name(f".{png.name}.tmp")
    with plots.styled():
        figure.savefig(temporary, format="png", dpi=200, facecolor="white")
    temporary.replace(png)
    return [svg, png]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
