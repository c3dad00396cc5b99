"""Pictures of a benchmark: throughput and memory against length, a line for each model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pha.report import plots
from pha.report.dots import save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {
    "throughput": ("tokens_per_second", 1.0, "tokens/s"),
    "memory": ("peak_memory", 1e9, "peak memory (GB)"),
}


def save_speed_plots(mode: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write the pictures of the rows of `pha.bench.runner.run_benchmark`.

    There is one for each measure, precision, batch size and compiled or not, as
    `MODE-MEASURE-PRECISION-bB[-compiled]` in SVG and PNG, where at least two lengths were measured;
    failed rows are left out.

    Args:
        mode: what was measured.
        rows: of the benchmark.
        folder: where they go.

    Returns:
        The files.
    """
    groups: dict[tuple[str, int, bool], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["error"] is None:
            key = (row["precision"], row["batch"], row["compiled"])
            groups.setdefault(key, []).append(row)
    written = []
    for (precision, batch, compiled), group in groups.items():
        if len({row["length"] for row in group}) < 2:
            continue
        for measure, (field, unit, label) in MEASURES.items():
            suffix = "-compiled" if compiled else ""
            stem = folder / f"{mode}-{measure}-{precision}-b{batch}{suffix}"
            title = f"{label} of {mode} against length, {precision}, batch {batch}"
            lines = _lines(group, field, unit)
            figure = length_plot(lines, f"{label}, {precision}, B = {batch}")
            written += save_picture(figure, stem, title)
    return written


Lines = dict[str, list[tuple[int, float, float, float]]]


def _lines(rows: Sequence[Mapping[str, Any]], field: str, unit: float) -> Lines:
    """Label -> (length, value, low, high) in the order of lengths."""
    lines: Lines = {}
    for row in rows:
        value = row[field]
        low, middle, high = (
            (value["low"], value["median"], value["high"])
            if isinstance(value, Mapping)
            else (value, value, value)
        )
        label = f"{row['model']} {row['backend']}".strip()
        lines.setdefault(label, []).append((row["length"], middle / unit, low / unit, high / unit))
    return {label: sorted(points) for label, points in lines.items()}


def length_plot(lines: Lines, y_label: str) -> Figure:
    """Lines over length in powers of two, from zero up, with a bar from low to high.

    Args:
        lines: label -> (length, value, low, high), at most a dozen.
        y_label: of the vertical axis.
    """
    lengths = sorted({point[0] for points in lines.values() for point in points})
    with plots.styled():
        columns = 2 if all(len(label) <= 22 for label in lines) else 1
        figure, axes = plots.new_figure(2.9 + 0.2 * math.ceil(len(lines) / columns))
        for index, (label, points) in enumerate(lines.items()):
            color = plots.series_color(index)
            # Colours repeat after six; a dash then tells the lines apart.
            dash = plots.DASHES[index // plots.SERIES_COUNT % len(plots.DASHES)]
            axes.errorbar(
                [x for x, *_ in points],
                [y for _, y, _, _ in points],
                yerr=[
                    [y - low for _, y, low, _ in points],
                    [high - y for _, y, _, high in points],
                ],
                color=color,
                linestyle=dash,
                linewidth=1.4,
                elinewidth=0.9,
                marker=plots.MARKERS[index % len(plots.MARKERS)][0],
                markersize=4.5,
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens")
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        if len(lines) > 1:
            figure.legend(loc="outside upper left", frameon=False, ncols=columns)
        return figure
