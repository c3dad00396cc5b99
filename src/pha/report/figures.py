"""Which data go into which figure of the page, with captions and words for those who see none."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from pha.report import plots
from pha.report.collect import Run
from pha.results import LayerMixing, TrainRecord
from pha.utils.text import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """An inline figure and its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Mixing:
    """The mixing figures of a run, or a note why there are none."""

    run: Run
    plots: list[Plot]
    note: str


_QUANTITIES: tuple[tuple[str, Callable[[LayerMixing], Mapping[str, float]]], ...] = (
    ("Softplus weights", lambda layer: layer.weights),
    ("Effective shares", lambda layer: layer.effective),
)


def learning_curves(runs: Sequence[Run]) -> list[Plot]:
    """Loss against tokens, and against training time."""
    by_tokens: list[plots.Series] = []
    by_seconds: list[plots.Series] = []
    for index, run in enumerate(runs):
        losses = [
            (record, record.loss)
            for record in run.metrics.eval
            if record.split == "validation" and math.isfinite(record.loss)
        ]
        # Without validation the training loss is all there is to look at.
        faint = bool(losses)
        by_tokens.append(_training(run, index, lambda p: p.tokens, lambda p: p.loss, faint))
        by_seconds.append(_training(run, index, lambda p: p.seconds, lambda p: p.loss, faint))
        if losses:
            tokens = [(p.tokens, y) for p, y in losses]
            seconds = [(_seconds_at(run.metrics.train, p.step), y) for p, y in losses]
            by_tokens.append(plots.Series(run.label, _known(tokens), index))
            by_seconds.append(plots.Series(run.label, _known(seconds), index))
    found = []
    if any(line.points for line in by_tokens):
        figure = plots.learning_curves(by_tokens, "tokens", "loss (nats per token)")
        found.append(_plot(figure, "Loss against tokens seen.", by_tokens))
    if any(line.points for line in by_seconds):
        figure = plots.learning_curves(by_seconds, "seconds", "loss (nats per token)")
        found.append(_plot(figure, "Loss against training time.", by_seconds))
    return found


def training_histories(runs: Sequence[Run]) -> list[Plot]:
    """Learning rate and gradient norm against tokens, where recorded."""
    found = []
    quantities: tuple[tuple[str, Callable[[TrainRecord], float]], ...] = (
        ("learning rate", lambda point: point.learning_rate),
        ("gradient norm", lambda point: point.grad_norm),
    )
    for name, value in quantities:
        series = [_training(run, i, lambda p: p.tokens, value, False) for i, run in enumerate(runs)]
        if any(line.points for line in series):
            figure = plots.history(series, "tokens", name)
            found.append(_plot(figure, f"{name.capitalize()} against tokens seen.", series))
    return found


def mixing(run: Run, color: int) -> Mixing:
    """Heat maps of the final mixing of a run, and its course over training."""
    if not run.mixing:
        return Mixing(run, [], "This run has no mixing weights.")
    if all(len(layer.weights) < 2 for layer in run.mixing):
        note = "Every layer of this run has a single branch, so there is nothing to mix."
        return Mixing(run, [], note)
    found = []
    for name, shares in _QUANTITIES:
        layers = [shares(layer) for layer in run.mixing]
        branches = plots.branch_names(layers)
        if not branches:
            continue
        means = ", ".join(f"{b} {percent(plots.mean_share(layers, b))}" for b in branches)
        svg = plots.to_svg(
            plots.mixing_heat_map(layers, color),
            f"Heat map: {name.lower()} of {run.label} in {len(layers)} layers. Means: {means}.",
        )
        found.append(Plot(Markup(svg), f"{name} by layer, in %."))
    for name, shares in _QUANTITIES:
        points = [
            (point.tokens, [shares(layer) for layer in point.layers])
            for point in run.metrics.mixing
        ]
        if len(points) < 2 or not any(layer for _, layers in points for layer in layers):
            continue
        svg = plots.to_svg(
            plots.mixing_history(points, "tokens", "share (%)"),
            f"{name} of {run.label} against tokens seen, by branch.",
        )
        caption = f"{name} over training: mean over layers, thin lines for single layers."
        found.append(Plot(Markup(svg), caption))
    return Mixing(run, found, "")


def _plot(figure: Figure, caption: str, series: Sequence[plots.Series]) -> Plot:
    ends = "; ".join(
        f"{line.label}: from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}"
        for line in series
        if line.points and not line.faint
    )
    return Plot(Markup(plots.to_svg(figure, f"{caption} {ends}.")), caption)


def _training(
    run: Run,
    color: int,
    x: Callable[[TrainRecord], float],
    y: Callable[[TrainRecord], float],
    faint: bool,
) -> plots.Series:
    points = [(x(point), value) for point in run.metrics.train if math.isfinite(value := y(point))]
    return plots.Series(run.label, _known(points), color, faint)


def _seconds_at(train: Sequence[TrainRecord], step: int) -> float | None:
    """Training seconds after `step` steps, from the training records around it."""
    known = [(0.0, 0.0), *((p.step, p.seconds) for p in train)]
    after = bisect_left(known, float(step), key=lambda pair: pair[0])
    if len(known) == 1:
        return None
    if after == len(known):
        return known[-1][1]
    (high_step, high), (low_step, low) = known[after], known[max(after - 1, 0)]
    if high_step == low_step:
        return high
    return low + (high - low) * (step - low_step) / (high_step - low_step)


def _known(points: Sequence[tuple[float | None, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if x is not None]
