"""Figures of training runs as SVG that follows the colours and fonts of the page around it.

Each function here returns a matplotlib `Figure` 360 points wide, so that its text stays legible
at the width of a phone; `to_svg` turns a figure into markup to put inline or into a file. Colours
are CSS variables (`--ink`, `--series-0`, ...) with the light palette as fallback: a page that sets
`DARK` under a dark colour scheme gets dark figures without drawing them twice.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from pha.utils import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = {
    "ink": "#1b1f27",
    "muted": "#5c6470",
    "grid": "#dfe3e8",
    "paper": "#fdfdfc",
    "series-0": "#0072b2",
    "series-1": "#c24e08",
    "series-2": "#007f5c",
    "series-3": "#aa3377",
    "series-4": "#8a6a00",
    "series-5": "#5a5b6e",
}
"""CSS variable -> colour on a light page. The series are dark relatives of the Okabe-Ito colours:
told apart under the common colour blindnesses, and at least 4.5:1 against the page."""

DARK = {
    "ink": "#e4e7ec",
    "muted": "#a2abb8",
    "grid": "#2e343d",
    "paper": "#14171c",
    "series-0": "#56b4e9",
    "series-1": "#ff9d5c",
    "series-2": "#3fcf9f",
    "series-3": "#ee8acb",
    "series-4": "#e3c84b",
    "series-5": "#b6b9c9",
}
"""The same variables on a dark page."""

SERIES_COUNT = 6
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"))
"""Marker of series i in a plot, and its glyph in text: a second way to tell series apart."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1.5, 1.5)))
"""Line style of series i where there are no markers."""

CURVE_POINTS = 500
FAINT_POINTS = 100
_WIDTH = 5.0
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
_VARIABLES = {color: f"var(--{name}, {color})" for name, color in LIGHT.items()}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pha",
    # Bundled with matplotlib, so that the layout does not depend on the machine's fonts.
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 10,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "ytick.major.size": 0,
    "xtick.major.width": 0.7,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}

Axis = Literal["tokens", "seconds"]


@dataclass(frozen=True)
class Series:
    """A line: finite points (x, y) in the order of x, and the index of its colour and marker.

    A faint line is context (training loss, single layers) and has no legend entry.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: int
    faint: bool = False


def learning_curves(series: Sequence[Series], axis: Axis, y_label: str) -> Figure:
    """Loss against tokens or training seconds.

    The largest fifth of the prominent values runs out of the frame: the first steps of training
    would otherwise flatten all that the curves differ by.
    """
    with styled():
        figure, axes = _line_figure(series, axis, y_label, height=3.1)
        main = _sorted_values([s for s in series if not s.faint] or series)
        if main:
            context = _sorted_values([s for s in series if s.faint]) or main
            # Noise dips below any curve; what is under the lowest 2% is noise.
            low = min(main[0], context[round(0.02 * (len(context) - 1))])
            top = main[round(0.8 * (len(main) - 1))]
            margin = 0.05 * (top - low) or 0.05 * abs(top) or 1.0
            axes.set_ylim(low - margin, top + margin)
        return figure


def history(series: Sequence[Series], axis: Axis, y_label: str) -> Figure:
    """Any other quantity over training, from zero up, in a low panel."""
    with styled():
        figure, axes = _line_figure(series, axis, y_label, height=2.1)
        axes.set_ylim(bottom=0)
        return figure


def mixing_heat_map(layers: Sequence[Mapping[str, float]], color: int) -> Figure:
    """Shares of the branches (columns) in every layer (rows), and their mean over layers.

    The shade of a cell is proportional to its share and starts at zero.
    """
    branches = branch_names(layers)
    means = {b: mean_share(layers, b) for b in branches}
    largest = max((v for layer in layers for v in layer.values()), default=0.0) or 1.0
    rows = [(str(index), layer) for index, layer in enumerate(layers)]
    with styled():
        from matplotlib.patches import Rectangle

        figure, axes = new_figure(height=0.55 + 0.235 * (len(rows) + 1.3))
        tops = [float(index) for index in range(len(rows))] + [len(rows) + 0.3]
        for top, (_, shares) in zip(tops, [*rows, ("mean", means)], strict=True):
            for column, branch in enumerate(branches):
                share = shares.get(branch)
                if share is not None:
                    # Never opaque: the number in the cell keeps its contrast in both schemes.
                    shade = 0.5 * max(share, 0.0) / largest
                    axes.add_patch(Rectangle((column + 0.015, top + 0.03), 0.97, 0.94, lw=0)).set(
                        facecolor=series_color(color), alpha=min(shade, 0.5)
                    )
                label = text.DASH if share is None else f"{100 * share:.1f}"
                axes.text(column + 0.5, top + 0.53, label, ha="center", va="center")
        axes.set_xlim(0, max(len(branches), 1))
        axes.set_ylim(len(rows) + 1.35, 0)
        axes.set_xticks(
            [column + 0.5 for column in range(len(branches))],
            [text.shorten(branch, 60 // max(len(branches), 1)) for branch in branches],
            parse_math=False,
        )
        axes.set_yticks([top + 0.5 for top in tops], [*(name for name, _ in rows), "mean"])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer")
        return figure


def mixing_history(
    points: Sequence[tuple[float, Sequence[Mapping[str, float]]]], axis: Axis, y_label: str
) -> Figure:
    """Shares in % over training: one line per branch for the mean, faint ones for the layers.

    `points` are (x, layers as in `mixing_heat_map`).
    """
    branches = branch_names([layer for _, layers in points for layer in layers])
    series = []
    for index, branch in enumerate(branches):
        # Runs take the first colours; branches start further on, not to be read as runs.
        color = index + 2
        for layer in range(max((len(layers) for _, layers in points), default=0)):
            line = [
                (x, 100 * layers[layer][branch])
                for x, layers in points
                if layer < len(layers) and branch in layers[layer]
            ]
            series.append(Series(branch, line, color, faint=True))
        mean = [(x, mean_share(layers, branch)) for x, layers in points]
        series.append(Series(branch, [(x, 100 * y) for x, y in mean if y is not None], color))
    with styled():
        figure, _ = _line_figure(series, axis, y_label, height=2.5)
        return figure


def branch_names(layers: Sequence[Mapping[str, float]]) -> list[str]:
    """All branches of the layers, in the order of their first appearance."""
    return list(dict.fromkeys(branch for layer in layers for branch in layer))


def mean_share(layers: Sequence[Mapping[str, float]], branch: str) -> float | None:
    """Mean share of a branch over the layers that mix it with others."""
    shares = [layer[branch] for layer in layers if branch in layer and len(layer) > 1]
    return sum(shares) / len(shares) if shares else None


def thin(
    points: Sequence[tuple[float, float]], limit: int = CURVE_POINTS
) -> list[tuple[float, float]]:
    """At most `limit` points that keep the ends and the extremes in between, spikes included."""
    if len(points) <= limit:
        return list(points)
    inner = points[1:-1]
    buckets = (limit - 2) // 2
    edges = [index * len(inner) // buckets for index in range(buckets + 1)]
    kept = [points[0]]
    for start, stop in pairwise(edges):
        order = sorted(range(start, stop), key=lambda index: inner[index][1])
        kept += [inner[index] for index in sorted({order[0], order[-1]})]
    return [*kept, points[-1]]


def to_svg(figure: Figure, title: str) -> str:
    """The figure as one `<svg>` element, the same bytes every time.

    Args:
        figure: from a function of this module.
        title: what the figure shows, in words, for readers who do not see it. Figures that share
            a page need different titles: their element ids are derived from title and content.
    """
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for child in list(root):
        # The style sheet holds one rule on `*`, which would reach every other SVG of the page.
        if child.tag == f"{_SVG}metadata" or child.find(f"{_SVG}style") is not None:
            root.remove(child)
    root.set("stroke-linejoin", "round")
    prefix = "f" + hashlib.sha256(f"{title}\0{buffer.getvalue()}".encode()).hexdigest()[:8] + "-"
    for element in root.iter():
        _restyle(element, prefix)
    _drop_unused_ids(root, prefix)
    heading = ElementTree.Element("title", {"id": f"{prefix}title"})
    heading.text = text.printable(title)
    root.insert(0, heading)
    root.set("xmlns", _SVG.strip("{}"))
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}title")
    return ElementTree.tostring(root, encoding="unicode")


def _restyle(element: ElementTree.Element, prefix: str) -> None:
    """Plain tag, short coordinates, ids of this figure's own, colours and font of the page."""
    element.tag = element.tag.removeprefix(_SVG)
    element.tail = None
    if element.text is not None and not element.text.strip():
        element.text = None
    for name, value in list(element.attrib.items()):
        if name == "id":
            value = prefix + value
        elif name == _XLINK_HREF:
            del element.attrib[name]
            name, value = "href", value.replace("#", f"#{prefix}", 1)
        elif name in ("d", "x", "y", "transform"):
            value = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}", value)
            value = " ".join(value.split())
        elif name == "style":
            value = re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), value)
            value = value.replace("'DejaVu Sans'", "var(--sans, sans-serif)")
        element.set(name, value.replace("url(#", f"url(#{prefix}"))


def _drop_unused_ids(root: ElementTree.Element, prefix: str) -> None:
    used = {
        match
        for element in root.iter()
        for name, value in element.attrib.items()
        if name != "id"
        for match in re.findall(rf"#({prefix}[^)\s]+)", value)
    }
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


@contextmanager
def styled() -> Iterator[None]:
    """This module's look for the time of a drawing, whatever a user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in a script that the bundled font lacks is drawn by the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _sorted_values(series: Sequence[Series]) -> list[float]:
    return sorted(y for line in series for _, y in line.points)


def series_color(index: int) -> str:
    """The colour of series `index`, from the light palette."""
    return LIGHT[f"series-{index % SERIES_COUNT}"]


def new_figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure `height` inches high, of the width that all have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_visible(False)
    return figure, figure.add_subplot()


def _line_figure(
    series: Sequence[Series], axis: Axis, y_label: str, height: float
) -> tuple[Figure, Axes]:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = [line for line in series if line.points]
    named = [line for line in shown if not line.faint]
    # Short names share a legend row; long ones get a row each.
    columns = 3 if all(len(line.label) <= 14 for line in named) else 1
    rows = math.ceil(len(named) / columns) if len(named) > 1 else 0
    figure, axes = new_figure(height + 0.2 * rows)
    factor, unit = _unit(axis, max((line.points[-1][0] for line in shown), default=0.0))
    handles = []
    for line in shown:
        points = thin(line.points, FAINT_POINTS if line.faint and len(shown) > 12 else CURVE_POINTS)
        marked = not line.faint and len(points) <= 60
        (handle,) = axes.plot(
            [x / factor for x, _ in points],
            [y for _, y in points],
            color=series_color(line.color),
            alpha=0.32 if line.faint else 1.0,
            linewidth=1.6 if marked else 0.8 if line.faint else 1.2,
            # Without markers, dashes tell lines apart and let an equal line show beneath.
            linestyle="-" if marked or line.faint else DASHES[line.color % len(DASHES)],
            marker=MARKERS[line.color % len(MARKERS)][0] if marked else None,
            markersize=4.2,
            markeredgewidth=0.4,
            markeredgecolor=LIGHT["paper"],
            zorder=2 if line.faint else 3,
        )
        if not line.faint:
            handles.append(handle)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.02)
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel(unit)
    axes.set_ylabel(y_label, parse_math=False)
    if len(handles) > 1:
        legend = figure.legend(
            handles,
            [text.shorten(line.label, 46) for line in named],
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            borderpad=0,
            handlelength=1.6,
            columnspacing=1.4,
        )
        for label in legend.get_texts():
            label.set_parse_math(False)
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
