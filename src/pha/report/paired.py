"""The picture of a paired comparison: how blocks differ, and on which tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pha.evals.compare import BinDifference, PairedComparison
from pha.report import plots
from pha.utils import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (7.6, 6.0)
_LINE = 100
_AXIS = "← A better        loss of A − loss of B (nats per token)        B better →"
_MUTED = plots.LIGHT["muted"]
# Colour, marker and its fill for A better, undecided and B better.
_LOOKS = {
    -1: (plots.series_color(0), "o", plots.series_color(0)),
    0: (_MUTED, "D", plots.LIGHT["paper"]),
    1: (plots.series_color(1), "s", plots.series_color(1)),
}


def paired_figure(comparison: PairedComparison) -> Figure:
    """Distribution of the block differences, and the mean difference in each bin, with 95% bars."""
    from matplotlib.figure import Figure

    with plots.styled():
        figure = Figure(figsize=_SIZE, layout="constrained")
        figure.patch.set_visible(False)
        panels = figure.subplots(2, 2).flat
        _blocks(next(panels), comparison)
        drawn = [next(panels) for _ in comparison.breakdowns]
        for axes, (name, bins) in zip(drawn, comparison.breakdowns.items(), strict=True):
            _bins(axes, name, bins)
        _same_scale(drawn)
        for axes in figure.axes:
            axes.axvline(0, color=_MUTED, linewidth=0.8, zorder=1)
            axes.tick_params(labelsize=8.5)
        figure.supxlabel(_AXIS, fontsize=9.5, color=_MUTED)
        _heading(figure, comparison)
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


def _heading(figure: Figure, comparison: PairedComparison) -> None:
    names = f"A: {text.shorten(comparison.a, 40)}     B: {text.shorten(comparison.b, 40)}"
    remarks = [comparison.verdict(), comparison.caution(), names]
    lines = [textwrap.fill(remark, _LINE) for remark in remarks if remark]
    figure.suptitle("\n".join(lines), fontsize=9.5, x=0.02, ha="left", parse_math=False)


def _blocks(axes: Axes, comparison: PairedComparison) -> None:
    """Histogram of the block means, with the overall mean and its interval above it."""
    differences, overall = comparison.block_differences, comparison.difference
    reach = float(np.abs(differences).max()) or 1e-3
    # An edge at zero, so that every bar is on one side.
    width = reach / min(12, max(6, round(len(differences) ** 0.5)))
    low = int(np.floor(differences.min() / width))
    high = max(low + 1, int(np.ceil(differences.max() / width)))
    edges = np.arange(low, high + 1) * width
    counts, _ = np.histogram(differences, edges)
    better = edges[1:] <= 0
    colors = [_LOOKS[-1 if a else 1][0] for a in better]
    axes.bar(edges[:-1], counts, width * 0.94, align="edge", color=colors, alpha=0.55, zorder=2)
    top = counts.max()
    _mean(axes, overall.mean, overall.half_width, top * 1.12, overall.sign)
    axes.set_ylim(0, top * 1.22)
    axes.set_ylabel("blocks", fontsize=8.5)
    _title(axes, f"{overall.blocks} blocks of {comparison.block_tokens:,} tokens, their mean")
    axes.margins(x=0.08)
    lowest, highest = axes.get_xlim()
    axes.set_xlim(min(lowest, -0.15 * reach), max(highest, 0.15 * reach))


def _bins(axes: Axes, name: str, bins: Sequence[BinDifference]) -> None:
    """One row for each bin that has an interval, the first on top."""
    bins = [entry for entry in bins if entry.difference.half_width is not None]
    for row, entry in enumerate(bins):
        difference = entry.difference
        _mean(axes, difference.mean, difference.half_width, row, difference.sign)
    labels = [f"{entry.label}  ({entry.share:.0%})" for entry in bins]
    axes.set_yticks(range(len(bins)), labels)
    axes.set_ylim(len(bins) - 0.4, -0.6)
    _title(axes, f"by {name}, with shares")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5)


def _mean(axes: Axes, mean: float, half_width: float | None, y: float, sign: int) -> None:
    color, marker, fill = _LOOKS[sign]
    axes.errorbar(
        mean,
        y,
        xerr=half_width,
        fmt=marker,
        color=color,
        markerfacecolor=fill,
        markersize=5,
        elinewidth=1.4,
        capsize=2.5,
        zorder=3,
    )


def _same_scale(panels: Sequence[Axes]) -> None:
    """The same horizontal axis for all, zero included, so that bars compare between panels."""
    if not panels:
        return
    low = min(0.0, *(axes.get_xlim()[0] for axes in panels))
    high = max(0.0, *(axes.get_xlim()[1] for axes in panels))
    margin = 0.04 * (high - low)
    for axes in panels:
        axes.set_xlim(low - margin, high + margin)
