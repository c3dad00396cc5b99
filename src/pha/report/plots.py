"""How figures look, and how they are saved: every rule of style, axes and legends, once.

`figures` and `charts` draw with what is here. A figure is 360 points wide, so that its text stays
legible at the width of a phone. In SVG its colours are CSS variables (`--ink`, `--series-0`, ...)
with the light palette as fallback: a page that sets `DARK` under a dark colour scheme gets dark
figures without drawing them twice.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from pha.utils.files import atomic_file, write_text
from pha.utils.text import printable, shorten

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

MUTED = LIGHT["muted"]
SERIES_COUNT = 6
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖")
"""In text, the marker of series i: a second way to tell series apart."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one more than colours, so that pairs differ longer
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1.5, 1.5)))
_WIDTH = 5.0
_SVG = "{http://www.w3.org/2000/svg}"
_VARIABLES = {color: f"var(--{name}, {color})" for name, color in LIGHT.items()}
_STYLE = {
    "svg.fonttype": "none",
    # Points that no eye tells apart are left out of long lines.
    "path.simplify_threshold": 1.0,
    # Bundled with matplotlib, so that the layout does not depend on the machine's fonts.
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "errorbar.capsize": 2.5,
}


@contextmanager
def styled() -> Iterator[None]:
    """This look for the time of a drawing, whatever a user's matplotlibrc says.

    `@styled()` above a function gives it to the whole function.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in a script that the bundled font lacks is drawn by the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height: float, legend: Sequence[str] = ()) -> tuple[Figure, Axes]:
    """An empty figure of axes `height` inches high, with room for a legend of these names."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(legend) / _columns(legend)) if len(legend) > 1 else 0
    figure = Figure(figsize=(_WIDTH, height + 0.2 * rows), layout="constrained")
    return figure, figure.add_subplot()


def new_panels(rows: int, columns: int, heights: Sequence[float], width: float = _WIDTH) -> Figure:
    """A figure of several axes, with rows of these heights in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure


def add_legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Name the series above the axes, where there are several."""
    if len(names) > 1:
        names = [shorten(name, 46) for name in names]
        figure.legend(handles, names, loc="outside upper left", ncols=_columns(names))


def _columns(names: Sequence[str]) -> int:
    """Short names share a row of the legend."""
    longest = max(map(len, names), default=0)
    return 3 if longest <= 14 else 2 if longest <= 22 else 1


def label_axes(axes: Axes, x: str, y: str, grid: Literal["x", "y"] = "y") -> None:
    """Names of the axes, and lines across one of them, which then needs no line of its own."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis=grid)
    if grid == "y":
        axes.spines["left"].set_visible(False)


def series_color(index: int) -> str:
    """The colour of series `index`, from the light palette."""
    return LIGHT[f"series-{index % SERIES_COUNT}"]


def look(index: int, marked: bool = True) -> dict[str, Any]:
    """Colour, marker and dash of series `index`.

    Without markers, dashes tell lines apart and let an equal line show beneath; with them, they
    tell the seventh line from the first.
    """
    dash = index // SERIES_COUNT if marked else index
    return {
        "color": series_color(index),
        "linestyle": _DASHES[dash % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)] if marked else None,
    }


def to_svg(figure: Figure, title: str) -> str:
    """The figure as one `<svg>` element, the same bytes every time.

    `title` says what it shows, for readers who do not see it. Figures that share a page need
    different ones: the ids of their elements depend on it.
    """
    import matplotlib

    title = printable(title)
    buffer = io.StringIO()
    with styled():
        matplotlib.rcParams["svg.hashsalt"] = title
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", _SVG.strip("{}"))
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())
    for child in list(root):
        # The style sheet holds one rule on `*`, which would reach every other SVG of the page.
        if child.tag == f"{_SVG}metadata" or child.find(f"{_SVG}style") is not None:
            root.remove(child)
    for element in root.iter():
        element.tail = None
        for name, value in list(element.attrib.items()):
            if name == "id" and "_" in value:
                del element.attrib[name]  # the name of a group, the same in every figure
            elif name in ("d", "x", "y", "transform"):
                rounded = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}", value)
                element.set(name, " ".join(rounded.split()))
            elif name == "style":
                value = re.sub("#[0-9a-f]{6}", lambda m: _VARIABLES.get(m[0], m[0]), value)
                element.set(name, value.replace("'DejaVu Sans'", "var(--sans, sans-serif)"))
    heading = ElementTree.Element(f"{_SVG}title")
    heading.text = title
    root.insert(0, heading)
    root.set("stroke-linejoin", "round")
    root.set("role", "img")
    return ElementTree.tostring(root, encoding="unicode")


def save_picture(figure: Figure, stem: Path, title: str) -> list[Path]:
    """Write a figure as `stem`.svg and `stem`.png (on white, 200 dots per inch); see `to_svg`."""
    svg, png = stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")
    write_text(svg, to_svg(figure, title) + "\n")
    with atomic_file(png) as temporary, styled():
        figure.savefig(temporary, format="png", dpi=200, facecolor="white")
    return [svg, png]
