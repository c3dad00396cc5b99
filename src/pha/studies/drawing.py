"""The plots of a study, from its outcome."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pha.report import plots
from pha.report.dots import save_picture
from pha.report.study_plots import (
    Estimate,
    Point,
    Rate,
    against_parameters,
    estimates,
    over_settings,
)
from pha.studies.measures import MEASURES
from pha.studies.outcome import MAIN, Outcome, Row
from pha.studies.published import find_published
from pha.studies.shares import last_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(outcome: Outcome, folder: Path) -> list[Path]:
    """Write every plot that the study asks for and the runs allow, as SVG and PNG."""
    written: list[Path] = []
    study = outcome.plan.study
    for name in study.plots:
        figure = _DRAW[name](outcome)
        if figure is not None:
            title = f"{study.title}: {_WORDS[name]}, scale {outcome.plan.scale.name}"
            written += save_picture(figure, folder / name, title)
    return written


def _heading(outcome: Outcome) -> str:
    scale = outcome.plan.scale.name
    return f"{MEASURES[MAIN].words}\nat scale {scale}, {outcome.tokens} tokens seen"


def _dots(outcome: Outcome) -> Figure | None:
    rows = [_estimate(row) for row in outcome.rows if row.values(MAIN)]
    return estimates(rows, _heading(outcome)) if rows else None


def _estimate(row: Row) -> Estimate:
    summary = row.summaries[MAIN]
    values = list(row.values(MAIN).values())
    return Estimate(row.variant.label, values, summary.mean, summary.interval)


def _differences(outcome: Outcome) -> Figure | None:
    by_name = {row.variant.name: row for row in outcome.rows}
    rows = []
    for each in outcome.differences:
        if each.a in by_name:
            a, b = by_name[each.a].values(MAIN), by_name[each.b].values(MAIN)
            values = [a[seed] - b[seed] for seed in each.seeds]
            label = by_name[each.a].variant.label
            rows.append(Estimate(label, values, each.mean, each.interval))
    if not rows:
        return None
    base = by_name[outcome.plan.study.baseline].variant.label
    return estimates(rows, f"test perplexity minus that of\n{base}", reference=0.0)


def _parameters(outcome: Outcome, measure: str = MAIN) -> Figure | None:
    ours = [
        Point(
            row.variant.label,
            row.summaries["parameters"].mean,
            list(row.values(measure).values()),
            row.summaries[measure].interval,
        )
        for row in outcome.rows
        if row.values(measure)
    ]
    if not ours:
        return None
    theirs = []
    for row in find_published(outcome.plan.study.published):
        value, std = row.perplexity, row.perplexity_std
        if measure == "accuracy":
            value, std = row.accuracy, row.accuracy_std
        if row.parameters is not None and value is not None:
            label = f"{row.label} (paper)" if row.from_paper else row.label
            theirs.append(Point(label, row.parameters, [value], std, grey=not row.like_for_like))
    tokens = f"{outcome.plan.scale.name}, {outcome.tokens} tokens"
    panels = [(f"ours: {tokens}; 95% intervals, rings: seeds", ours)]
    if theirs:
        grey = "; grey: not like for like" if any(point.grey for point in theirs) else ""
        panels.append((f"published, WikiText-103; ± deviation{grey}", theirs))
    return against_parameters(panels, f"test {'accuracy, %' if measure != MAIN else 'perplexity'}")


def _accuracy(outcome: Outcome) -> Figure | None:
    return _parameters(outcome, "accuracy")


def _curves(outcome: Outcome) -> Figure | None:
    series = []
    for index, row in enumerate(outcome.rows):
        by_tokens: dict[float, list[float]] = {}
        runs = row.runs()
        for run in runs:
            for record in run.metrics.eval:
                if record.split == "validation" and record.tokens and math.isfinite(record.loss):
                    by_tokens.setdefault(record.tokens, []).append(record.loss)
        mean = [
            (x, math.fsum(losses) / len(losses))
            for x, losses in sorted(by_tokens.items())
            if len(losses) == len(runs)
        ]
        if mean:
            series.append(plots.Series(row.variant.label, mean, index))
    if not series:
        return None
    return plots.learning_curves(series, "tokens", "validation loss (nats per token)")


def _settings(outcome: Outcome) -> Figure | None:
    axis = outcome.plan.study.axis
    values: dict[str, dict[str, list[float]]] = {}
    diverged: dict[str, dict[str, int]] = {}
    for row in outcome.rows:
        places = dict(row.variant.places)
        place = places.pop(axis)
        own = row.variant.label.replace(f", {axis} {place}", "")
        values.setdefault(own, {})[place] = list(row.values("validation").values())
        diverged.setdefault(own, {})[place] = row.diverged
    series = [Rate(name, by_place, diverged[name]) for name, by_place in values.items()]
    label = f"{axis}; a cross at the top: diverged"
    return over_settings(series, label, "validation perplexity")


def _shares(outcome: Outcome) -> Figure | None:
    runs = last_weights(outcome)
    if not runs:
        return None
    layers = [
        {name: math.fsum(run[i][name] for run in runs) / len(runs) for name in layer}
        for i, layer in enumerate(runs[0])
    ]
    return plots.mixing_heat_map(layers, 0)


_DRAW: dict[str, Callable[[Outcome], Figure | None]] = {
    "dots": _dots,
    "differences": _differences,
    "parameters": _parameters,
    "accuracy": _accuracy,
    "curves": _curves,
    "settings": _settings,
    "shares": _shares,
}
_WORDS = {
    "dots": "test perplexity of every seed, with means and 95% intervals",
    "differences": "paired differences with 95% intervals",
    "parameters": "test perplexity against parameters",
    "accuracy": "test accuracy against parameters",
    "curves": "validation loss against tokens, means over seeds",
    "settings": "validation perplexity over a setting",
    "shares": "mixing weights by layer in %, means over the last checkpoints and over seeds",
}
