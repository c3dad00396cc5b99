"""Run folders -> `report.html`: one file without scripts, fonts or anything else to fetch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from pha import __version__
from pha.report import figures, plots
from pha.report.collect import Run, collect, fact_groups
from pha.report.compare import comparisons, limits, warnings
from pha.report.figures import Axis, Series
from pha.results import Sample
from pha.utils.files import write_text
from pha.utils.outputs import require_file, writing
from pha.utils.text import percent, plain, printable


@dataclass(frozen=True)
class Plot:
    """An inline figure and its caption."""

    svg: Markup
    caption: str


def environment() -> jinja2.Environment:
    """Templates of pages: everything is escaped, with control characters made visible."""

    def visible(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and type(value) is not Markup else value

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("pha.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=visible,
    )
    found.filters["plain"] = plain
    found.filters["yaml"] = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    found.globals.update(light=plots.LIGHT, dark=plots.DARK, version=__version__)
    return found


def write_report(runs: Sequence[Path], out: Path, title: str | None = None) -> Path:
    """Write one self-contained HTML page that compares runs, finished or not, in their order.

    The same run folders give the same bytes. `title` is by default the names of the runs.

    Raises:
        PHAError: a path is not a run folder or holds a damaged file, or `out` cannot be written.
    """
    require_file(out)
    html = _render(collect(runs), title)
    with writing(out):
        write_text(out, html)
    return out


def _render(runs: Sequence[Run], title: str | None) -> str:
    names = " and ".join(run.label for run in runs)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title or (names if len(runs) < 3 else f"Comparison of {len(runs)} runs"),
            limits=limits(runs),
            warnings=warnings(runs),
            runs=runs,
            glyphs=[plots.GLYPHS[i % len(plots.GLYPHS)] for i in range(len(runs))],
            colors=[i % plots.SERIES_COUNT for i in range(len(runs))],
            comparisons=comparisons(runs),
            curves=_learning_curves(runs),
            numerics=[_numerics(run, index) for index, run in enumerate(runs)],
            mixing=[_mixing(run, index) for index, run in enumerate(runs)],
            prompts=_prompts(runs),
            fact_groups=fact_groups(runs),
        )
    )


def _prompts(runs: Sequence[Run]) -> dict[str, list[tuple[int, Sample]]]:
    """Samples by prompt, so that continuations of the same prompt stand side by side."""
    prompts: dict[str, list[tuple[int, Sample]]] = {}
    for index, run in enumerate(runs):
        for sample in run.result.samples if run.result else ():
            prompts.setdefault(sample.prompt, []).append((index, sample))
    return prompts


def _learning_curves(runs: Sequence[Run]) -> list[Plot]:
    """Validation loss, with the training loss behind it, against tokens and against time."""
    axes: tuple[tuple[Axis, str], ...] = (("tokens", "tokens seen"), ("seconds", "training time"))
    found = []
    for axis, words in axes:
        series = []
        for index, run in enumerate(runs):
            times = {0: 0.0} | {record.step: record.seconds for record in run.metrics.train}
            known, seconds = list(times), list(times.values())
            validation = [record for record in run.metrics.eval if record.split == "validation"]
            # Without validation the training loss is all there is to look at, and not faint.
            for records, faint in ((run.metrics.train, bool(validation)), (validation, False)):
                finite = [r for r in records if math.isfinite(r.loss)]
                x: list[float] = [r.tokens for r in finite]
                if axis == "seconds":
                    x = np.interp([r.step for r in finite], known, seconds).tolist()
                points = [(at, r.loss) for at, r in zip(x, finite, strict=True)]
                if axis == "tokens" or run.metrics.train:
                    series.append(Series(run.label, points, index, faint))
        if any(line.points for line in series):
            figure = figures.learning_curves(series, axis, "loss (nats per token)")
            ends = "; ".join(
                f"{line.label}: from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}"
                for line in series
                if line.points and not line.faint
            )
            caption = f"Loss against {words}."
            found.append(Plot(Markup(plots.to_svg(figure, f"{caption} {ends}.")), caption))
    return found


def _numerics(run: Run, color: int) -> Plot | None:
    """Sizes by layer over the steps, with spikes marked; None where nothing was watched."""
    if not run.metrics.watch:
        return None
    spikes = [each.began for each in run.metrics.warning if each.what == "loss spike"]
    figure = figures.layer_sizes(run.metrics.watch, spikes, color)
    caption = "Rms of what enters each layer and of its gradient; darker lines are later layers."
    marks = f" Dashed: steps at which spikes began, {plain(spikes)}." if spikes else ""
    return Plot(Markup(plots.to_svg(figure, f"{run.label}: {caption}{marks}")), caption + marks)


def _mixing(run: Run, color: int) -> list[Plot] | str:
    """Heat maps of the final mixing and its course over training, or why there are none."""
    if not run.mixing:
        return "This run has no mixing weights."
    if all(len(layer.weights) < 2 for layer in run.mixing):
        return "Every layer of this run has a single branch, so there is nothing to mix."
    kinds: dict[str, figures.Kind] = {
        "Softplus weights": "weights",
        "Effective shares": "effective",
    }
    found = []
    for name, kind in kinds.items():
        layers = figures.shares_of(run.mixing, kind)
        means = ", ".join(
            f"{branch} {percent(figures.mean_share(layers, branch))}"
            for branch in figures.branch_names(layers)
        )
        title = f"Heat map: {name.lower()} of {run.label} in {len(layers)} layers. Means: {means}."
        svg = plots.to_svg(figures.mixing_heat_map(layers, color), title)
        found.append(Plot(Markup(svg), f"{name} by layer, in %."))
    if len(run.metrics.mixing) > 1:
        for name, kind in kinds.items():
            title = f"{name} of {run.label} against tokens seen, by branch."
            svg = plots.to_svg(figures.mixing_history(run.metrics.mixing, kind), title)
            caption = f"{name} over training: mean over layers, thin lines for single layers."
            found.append(Plot(Markup(svg), caption))
    return found
