"""The figures of an inspection: how far branches remember, and what they are needed for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pha.evals.inspection import BranchReport, Inspection
from pha.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_pictures(found: Inspection, folder: Path, name: str) -> list[Path]:
    """Write every figure that there is something for, as inspection-WHAT.svg and .png."""
    written = []
    for what, figure, words in _figures(found):
        title = f"{name}: {words}"
        written += plots.save_picture(figure, folder / f"inspection-{what}", title)
    return written


PICTURES = ("half-lives", "horizon", "need")


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


@plots.styled()
def horizons(found: Inspection) -> Figure:
    """The rise of the loss over the window, with 95% bars, a line for each branch."""
    names = list(dict.fromkeys(each.branch for each in found.horizons))
    figure, axes = plots.new_figure(2.9, legend=names)
    handles = []
    for index, name in enumerate(names):
        mine = [each for each in found.horizons if each.branch == name]
        bars = [each.nats.half_width or 0.0 for each in mine]
        x, y = [each.window for each in mine], [each.nats.mean for each in mine]
        handles.append(axes.errorbar(x, y, yerr=bars, **plots.look(index)))
    windows = sorted({each.window for each in found.horizons})
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(windows, [f"{window:,}" for window in windows])
    axes.axhline(0, color=plots.MUTED, linewidth=0.8)
    label = "rise of the loss (nats per token)"
    plots.label_axes(axes, "tokens that each token sees through the branch", label)
    plots.add_legend(figure, handles, names)
    return figure


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
