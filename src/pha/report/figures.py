"""The figures of runs: learning curves, the mixing of branches, and what an inspection finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pha.report import plots
from pha.report.charts import over_lengths
from pha.results import LayerMixing, MixingRecord, WatchRecord
from pha.utils import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pha.evals.inspection import BranchReport, Inspection

Axis = Literal["tokens", "seconds"]
Kind = Literal["weights", "effective"]

PICTURES = ("half-lives", "horizon", "need")
"""Of an inspection."""


@dataclass(frozen=True)
class Series:
    """A line: finite points (x, y) in the order of x, and the index of its colour and marker.

    A faint line is context (training loss, single layers) and has no legend entry.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: int
    faint: bool = False


@plots.styled()
def learning_curves(series: Sequence[Series], axis: Axis, y_label: str) -> Figure:
    """Loss against tokens or training seconds.

    The largest fifth of the prominent values runs out of the frame: the first steps of training
    would otherwise flatten all that the curves differ by.
    """
    figure, axes = _lines(series, axis, y_label, height=3.1)
    faint = sorted(y for line in series if line.faint for _, y in line.points)
    main = sorted(y for line in series if not line.faint for _, y in line.points) or faint
    if main:
        context = faint or main
        # Noise dips below any curve; what is under the lowest 2% is noise.
        low = min(main[0], context[round(0.02 * (len(context) - 1))])
        top = main[round(0.8 * (len(main) - 1))]
        margin = 0.05 * (top - low) or 0.05 * abs(top) or 1.0
        axes.set_ylim(low - margin, top + margin)
    return figure


@plots.styled()
def mixing_heat_map(layers: Sequence[Mapping[str, float]], color: int) -> Figure:
    """Shares of the branches (columns) in every layer (rows), and their mean over layers.

    The shade of a cell is proportional to its share and starts at zero.
    """
    from matplotlib.patches import Rectangle

    branches, count = branch_names(layers), len(layers)
    means = {branch: mean_share(layers, branch) for branch in branches}
    largest = max((v for layer in layers for v in layer.values()), default=0.0) or 1.0
    tops, names = [*range(count), count + 0.3], [*map(str, range(count)), "mean"]
    figure, axes = plots.new_figure(0.55 + 0.235 * (count + 1.3))
    for top, shares in zip(tops, [*layers, means], strict=True):
        for column, branch in enumerate(branches):
            share = shares.get(branch)
            if share is not None:
                # Never opaque: the number in the cell keeps its contrast in both schemes.
                shade = 0.5 * max(share, 0.0) / largest
                cell = Rectangle((column + 0.015, top + 0.03), 0.97, 0.94, lw=0, alpha=shade)
                axes.add_patch(cell).set_facecolor(plots.series_color(color))
            label = text.DASH if share is None else f"{100 * share:.1f}"
            axes.text(column + 0.5, top + 0.53, label, ha="center", va="center")
    columns = max(len(branches), 1)
    axes.set_xlim(0, columns)
    axes.set_ylim(count + 1.35, 0)
    short = [text.shorten(branch, 60 // columns) for branch in branches]
    axes.set_xticks([column + 0.5 for column in range(len(branches))], short)
    axes.set_yticks([top + 0.5 for top in tops], names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("layer")
    return figure


@plots.styled()
def mixing_history(records: Sequence[MixingRecord], kind: Kind) -> Figure:
    """Shares in % over training: one line per branch for the mean, faint ones for the layers."""
    points = [(record.tokens, shares_of(record.layers, kind)) for record in records]
    series = []
    for index, branch in enumerate(
        branch_names([layer for _, layers in points for layer in layers])
    ):
        # Runs take the first colours; branches start further on, not to be read as runs.
        color = index + 2
        for layer in range(len(points[0][1])):
            line = [
                (x, 100 * layers[layer][branch]) for x, layers in points if branch in layers[layer]
            ]
            series.append(Series(branch, line, color, faint=True))
        means = [(x, mean_share(layers, branch)) for x, layers in points]
        series.append(Series(branch, [(x, 100 * y) for x, y in means if y is not None], color))
    return _lines(series, "tokens", "share (%)", height=2.5)[0]


@plots.styled()
def layer_sizes(records: Sequence[WatchRecord], spikes: Sequence[int], color: int) -> Figure:
    """Rms over steps of what enters each layer and of its gradient; later layers are darker.

    A dashed line marks a step at which a spike began.
    """
    figure = plots.new_panels(2, 1, [1.8, 2.0])
    steps, count = [record.step for record in records], len(records[0].layers)
    for axes, field, name in zip(
        figure.axes, ("rms", "gradient"), ("input", "gradient"), strict=True
    ):
        for layer in range(count):
            sizes = [getattr(record.layers[layer], field) for record in records]
            alpha = 0.3 + 0.7 * (layer + 1) / count
            look = plots.look(color, marked=len(steps) == 1)
            axes.plot(steps, sizes, **look | {"linestyle": "-", "alpha": alpha, "linewidth": 1.0})
        for step in spikes:
            axes.axvline(step, color=plots.MUTED, linewidth=0.9, linestyle="--")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        plots.label_axes(axes, "steps" if field == "gradient" else "", f"rms of the {name}")
    return figure


def shares_of(layers: Sequence[LayerMixing], kind: Kind) -> list[dict[str, float]]:
    """Branch -> weight, or -> effective share, of every layer."""
    return [getattr(layer, kind) for layer in layers]


def branch_names(layers: Sequence[Mapping[str, float]]) -> list[str]:
    """All branches of the layers, in the order of their first appearance."""
    return list(dict.fromkeys(branch for layer in layers for branch in layer))


def mean_share(layers: Sequence[Mapping[str, float]], branch: str) -> float | None:
    """Mean share of a branch over the layers that mix it with others."""
    shares = [layer[branch] for layer in layers if branch in layer and len(layer) > 1]
    return sum(shares) / len(shares) if shares else None


def _lines(
    series: Sequence[Series], axis: Axis, y_label: str, height: float
) -> tuple[Figure, Axes]:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = [line for line in series if line.points]
    names = [line.label for line in shown if not line.faint]
    figure, axes = plots.new_figure(height, legend=names)
    factor, unit = _unit(axis, max((line.points[-1][0] for line in shown), default=0.0))
    handles = []
    for line in shown:
        marked = not line.faint and len(line.points) <= 60
        style = plots.look(line.color, marked)
        if line.faint:
            style |= {"alpha": 0.32, "linewidth": 0.8, "linestyle": "-", "zorder": 2}
        else:
            style |= {"linewidth": 1.6 if marked else 1.2, "zorder": 3}
            style |= {"markeredgewidth": 0.4, "markeredgecolor": plots.LIGHT["paper"]}
        (handle,) = axes.plot(
            [x / factor for x, _ in line.points], [y for _, y in line.points], **style
        )
        if not line.faint:
            handles.append(handle)
    plots.label_axes(axes, unit, y_label)
    axes.margins(x=0.02)
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    plots.add_legend(figure, handles, names)
    return figure, axes


def _unit(axis: Axis, largest: float) -> tuple[float, str]:
    """Divisor and name of the unit that gives readable tick labels."""
    if axis == "seconds":
        if largest >= 2 * 3600:
            return 3600.0, "training time (hours)"
        return (60.0, "training time (minutes)") if largest >= 120 else (1.0, "training time (s)")
    for factor, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if largest >= factor:
            return factor, f"tokens seen ({word})"
    return 1.0, "tokens seen"


def save_pictures(found: Inspection, folder: Path, name: str) -> list[Path]:
    """Write every figure that there is something for, as inspection-WHAT.svg and .png."""
    written = []
    for what, figure, words in _figures(found):
        title = f"{name}: {words}"
        written += plots.save_picture(figure, folder / f"inspection-{what}", title)
    return written


def _figures(found: Inspection) -> Iterator[tuple[str, Figure, str]]:
    if any(each.memory for each in found.branches):
        words = "half-lives of states by layer, the middle 80% and the median"
        yield "half-lives", half_lives(found.branches), words
    if found.horizons:
        words = "what the loss rises by when tokens see the last w alone through a branch"
        yield "horizon", horizons(found), words
    if found.agreement is not None:
        yield "need", share_and_need(found), "share of the mix against need, by layer and branch"


@plots.styled()
def half_lives(branches: Sequence[BranchReport]) -> Figure:
    """A row for each layer and branch: from one tenth to nine tenths, the median as a dot.

    Grey is the start of training.
    """
    rows = [each for each in branches if each.memory is not None]
    names = ["start", "now"] if any(each.before for each in rows) else ["now"]
    figure, axes = plots.new_figure(0.8 + 0.34 * len(rows), legend=names)
    handles = {}
    for place, row in enumerate(rows):
        for which, memory, shift in (("start", row.before, -0.15), ("now", row.memory, 0.15)):
            if memory is None:
                continue
            low, middle, high = memory.quantiles
            color = plots.MUTED if which == "start" else plots.series_color(0)
            axes.plot([low, high], [place + shift] * 2, color=color, linewidth=2.2, alpha=0.6)
            axes.plot(memory.longest, place + shift, "|", color=color, markersize=7)
            style = "s" if which == "start" else "o"
            handles[which] = axes.plot(middle, place + shift, style, color=color)[0]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [f"{each.branch}, layer {each.layer}" for each in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    plots.label_axes(axes, "half-life in tokens: 10% to 90%, median, longest", "", grid="x")
    plots.add_legend(figure, [handles[name] for name in names], names)
    return figure


def horizons(found: Inspection) -> Figure:
    """The rise of the loss over the window, with 95% bars, a line for each branch."""
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for each in found.horizons:
        mean, half = each.nats.mean, each.nats.half_width or 0.0
        lines.setdefault(each.branch, []).append((each.window, mean, mean - half, mean + half))
    label = "rise of the loss (nats per token)"
    axis = "tokens that each token sees through the branch"
    return over_lengths(lines, label, axis, from_zero=False)


@plots.styled()
def share_and_need(found: Inspection) -> Figure:
    """A point for each layer and branch, numbered by its layer; need on a symmetric log scale."""
    assert found.agreement is not None
    names = list(dict.fromkeys(each.branch for each in found.branches))
    shares = {(each.layer, each.branch): each.share or 0.0 for each in found.branches}
    figure, axes = plots.new_figure(3.3, legend=names)
    handles = []
    for index, name in enumerate(names):
        mine = [each for each in found.need if each.branch == name and each.layer is not None]
        points = [(100 * shares[n.layer or 0, name], n.nats["mean"].mean) for n in mine]
        (handle,) = axes.plot(*zip(*points, strict=True), **plots.look(index) | {"linestyle": ""})
        handles.append(handle)
        for need, (x, y) in zip(mine, points, strict=True):
            style: dict[str, Any] = {
                "fontsize": 8,
                "color": plots.series_color(index),
                "va": "center",
            }
            style |= {"xytext": (5, 0), "textcoords": "offset points"}
            axes.annotate(str(need.layer), (x, y), **style)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.08, y=0.08)
    tau, p = found.agreement
    axes.set_title(f"numbers: layers; Kendall's tau {tau:+.2f} (p = {p:.2g})")
    label = "rise of the loss (nats per token)"
    plots.label_axes(axes, "effective share of the mix (%)", label)
    plots.add_legend(figure, handles, names)
    return figure
