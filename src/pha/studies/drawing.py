"""The plots of a study, from its outcome."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pha.report import figures
from pha.report.charts import (
    Estimate,
    Fan,
    Point,
    Rate,
    against_size,
    estimates,
    fans,
    over_settings,
)
from pha.report.laws import PowerLaw, power_laws
from pha.report.plots import save_picture
from pha.studies import laws, tasks
from pha.studies.measures import MEASURES
from pha.studies.outcome import MAIN, Outcome
from pha.studies.published import find_published
from pha.studies.shares import last_weights, mean_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(outcome: Outcome, folder: Path) -> list[Path]:
    """Write every plot that the study asks for and the runs allow, as SVG and PNG.

    A plot of earlier runs that these do not allow is deleted.
    """
    written: list[Path] = []
    study, scale = outcome.plan.study, outcome.plan.scale
    for name in study.plots:
        make, words = _PLOTS[name]
        figure = make(outcome)
        if figure is not None:
            title = f"{study.title}: {words}, {scale.words}"
            written += save_picture(figure, folder / name, title)
        else:
            for suffix in ("svg", "png"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    return written


def _dots(outcome: Outcome) -> Figure | None:
    rows = [
        Estimate(row.variant.label, list(row.values(MAIN).values()), over.mean, over.interval)
        for row in outcome.rows
        if (over := row.summary(MAIN)) is not None
    ]
    where = f"{outcome.plan.scale.words}, {outcome.tokens} tokens seen"
    return estimates(rows, f"{MEASURES[MAIN].words}\n{where}") if rows else None


def _differences(outcome: Outcome) -> Figure | None:
    by_name = {row.variant.name: row for row in outcome.rows}
    rows = []
    for each in outcome.differences:
        if each.a in by_name:  # the others are inside runs
            a, b = by_name[each.a].values(MAIN), by_name[each.b].values(MAIN)
            values = [a[seed] - b[seed] for seed in each.seeds]
            label = by_name[each.a].variant.label
            rows.append(Estimate(label, values, each.mean, each.interval))
    if not rows:
        return None
    base = by_name[outcome.plan.study.baseline].variant.label
    return estimates(rows, f"test perplexity minus that of\n{base}", reference=0.0)


def _points(outcome: Outcome, measure: str, against: str) -> list[Point]:
    return [
        Point(row.variant.label, size.mean, list(row.values(measure).values()), over.interval)
        for row in outcome.rows
        if (over := row.summary(measure)) and (size := row.summary(against))
    ]


def _cost(outcome: Outcome, against: str, label: str) -> Figure | None:
    points = _points(outcome, "bits", against)
    where = f"{outcome.plan.scale.words}, {outcome.tokens} tokens"
    panels = [(f"{where}\n95% intervals, rings: seeds", points)]
    return against_size(panels, MEASURES["bits"].heading, label) if points else None


def _parameters(outcome: Outcome, measure: str = MAIN) -> Figure | None:
    ours = _points(outcome, measure, "parameters")
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
    where = f"{outcome.plan.scale.words}, {outcome.tokens} tokens"
    panels = [(f"ours: {where}\n95% intervals, rings: seeds", ours)]
    if theirs:
        grey = "; grey: not like for like" if any(point.grey for point in theirs) else ""
        panels.append((f"published, WikiText-103; ± deviation{grey}", theirs))
    return against_size(panels, f"test {'accuracy, %' if measure != MAIN else 'perplexity'}")


def _curves(outcome: Outcome) -> Figure | None:
    series = []
    for index, row in enumerate(outcome.rows):
        histories = row.histories()
        by_tokens: dict[float, list[float]] = {}
        for metrics in histories:
            for record in metrics.eval:
                if record.split == "validation" and record.tokens and math.isfinite(record.loss):
                    by_tokens.setdefault(record.tokens, []).append(record.loss)
        mean = [
            (x, math.fsum(losses) / len(losses))
            for x, losses in sorted(by_tokens.items())
            if len(losses) == len(histories)
        ]
        if mean:
            series.append(figures.Series(row.variant.label, mean, index))
    if not series:
        return None
    return figures.learning_curves(series, "tokens", "validation loss (nats per token)")


def _settings(outcome: Outcome) -> Figure | None:
    axis = outcome.plan.study.axis
    values: dict[str, dict[str, list[float]]] = {}
    diverged: dict[str, dict[str, int]] = {}
    for row in outcome.rows:
        place = row.variant.places[axis]
        others = (f"{name} {at}" for name, at in row.variant.places.items() if name != axis)
        own = ", ".join(filter(None, [row.variant.base, *others]))
        values.setdefault(own, {})[place] = list(row.values("validation").values())
        diverged.setdefault(own, {})[place] = row.diverged
    series = [Rate(name, by_place, diverged[name]) for name, by_place in values.items()]
    label = f"{axis}; a cross at the top: diverged"
    return over_settings(series, label, "validation perplexity")


def _shares(outcome: Outcome) -> Figure | None:
    runs = last_weights(outcome)
    return figures.mixing_heat_map(mean_layers(runs), 0) if runs else None


def _scores(
    outcome: Outcome, panels: Callable[[Outcome], list[tuple[str, list[Fan]]]], label: str
) -> Figure | None:
    return fans(panels(outcome), label, tasks.score_label(outcome)) if outcome.results else None


def _laws(outcome: Outcome) -> Figure | None:
    series = [
        PowerLaw(law.label, law.flops, law.bits, [law.line.power(x) for x in law.flops])
        if law.line is not None
        else PowerLaw(law.label, law.flops, law.bits, [])
        for law in laws.laws_of(outcome)
    ]
    label = f"FLOP of training, {outcome.plan.scale.words}"
    return power_laws(series, label, MEASURES["bits"].heading) if series else None


def _state(outcome: Outcome) -> Figure | None:
    points = []
    for row in outcome.rows:
        scores = [tasks.score_of(r.evaluations[0]) for r in tasks.results_of(row)]
        kept = row.summary("cache")
        if scores and kept:
            label, median = row.variant.label, statistics.median(scores)
            points.append(Point(label, kept.mean, scores, place=median))
    if not points:
        return None
    test = outcome.results[0].evaluations[0].split
    panels = [(f"test {test}\nmedians, rings: seeds", points)]
    return against_size(panels, tasks.score_label(outcome), "bytes kept of a sequence")


_PLOTS: dict[str, tuple[Callable[[Outcome], Figure | None], str]] = {
    "dots": (_dots, "test perplexity of every seed, with means and 95% intervals"),
    "differences": (_differences, "paired differences with 95% intervals"),
    "parameters": (_parameters, "test perplexity against parameters"),
    "accuracy": (partial(_parameters, measure="accuracy"), "test accuracy against parameters"),
    "cache": (
        partial(_cost, against="cache", label="bytes kept of a sequence"),
        "bits per byte against the size of the cache",
    ),
    "time": (
        partial(_cost, against="seconds", label="seconds of training"),
        "bits per byte against training time",
    ),
    "tests": (
        partial(_scores, panels=tasks.by_test, label="test"),
        "every test, thin lines for seeds and thick ones for their medians",
    ),
    "distances": (
        partial(_scores, panels=tasks.by_distance, label="tokens back, or read"),
        "over distance, thin lines for seeds and thick ones for medians",
    ),
    "laws": (_laws, "bits per byte against training FLOPs, with power laws"),
    "state": (_state, "the first test against the size of the state"),
    "curves": (_curves, "validation loss against tokens, means over seeds"),
    "settings": (_settings, "validation perplexity over a setting"),
    "shares": (
        _shares,
        "mixing weights by layer in %, means over the last checkpoints and over seeds",
    ),
}
