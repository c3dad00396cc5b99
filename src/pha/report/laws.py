"""The figure of power laws: a measure over a cost, both in powers, with fitted lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pha.report import plots
from pha.utils import text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PowerLaw:
    """A model over its sizes."""

    label: str
    x: Sequence[float]
    y: Sequence[float]  # measured, as long
    fitted: Sequence[float]  # by the law, as long; empty without one


@plots.styled()
def power_laws(series: Sequence[PowerLaw], x_label: str, y_label: str) -> Figure:
    """Marks for what was measured and a line for each law, on logarithmic axes."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = [each.label for each in series]
    figure, axes = plots.new_figure(3.2, legend=names)
    for index, each in enumerate(series):
        style = plots.look(index)
        axes.plot(each.x, each.y, **style | {"linestyle": "none"})
        if each.fitted:
            axes.plot(each.x, each.fitted, **style | {"marker": None}, linewidth=1.1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text.count(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    plots.label_axes(axes, x_label, y_label)
    plots.add_legend(figure, [Line2D([], [], **plots.look(i)) for i in range(len(names))], names)
    return figure
