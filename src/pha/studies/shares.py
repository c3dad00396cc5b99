"""The analysis of the study `mixing`: shares per layer, their stability and the sandwich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pha.report.collect import Run
from pha.report.formats import Section, TextTable
from pha.studies.outcome import Outcome
from pha.studies.published import Published, find_published
from pha.studies.sandwich import LAST, Contrast, Layers, Sign, sandwich, settled, tell
from pha.studies.seeds import summarise
from pha.utils.text import DASH

EXPECTED: dict[str, Sign] = {"gss": "positive", "attention": "negative"}


@dataclass(frozen=True)
class Shares:
    """The analysis.

    Attributes:
        table: weights by layer, ours and the paper's.
        sentences: on stability and the sandwich.
        record: for JSON.
    """

    table: TextTable
    sentences: list[str]
    record: dict[str, Any]


def _runs(outcome: Outcome) -> list[Run]:
    return [run for row in outcome.rows for run in row.runs() if run.metrics.mixing]


def _histories(runs: Sequence[Run]) -> list[list[Layers]]:
    return [
        [[layer.weights for layer in record.layers] for record in run.metrics.mixing]
        for run in runs
    ]


def mean_layers(models: Sequence[Layers]) -> Layers:
    """Means by layer and branch, over models or checkpoints of the same branches."""
    return [
        {name: math.fsum(each[i][name] for each in models) / len(models) for name in layer}
        for i, layer in enumerate(models[0])
    ]


def last_weights(outcome: Outcome) -> list[Layers]:
    """Weights by layer of every finished run, each the mean over its last checkpoints."""
    return [mean_layers(history[-LAST:]) for history in _histories(_runs(outcome))]


def analyse(outcome: Outcome) -> Shares:
    """Read the shares of every finished run of a study, over its last checkpoints."""
    runs = _runs(outcome)
    histories = _histories(runs)
    effective = [[layer.effective for layer in run.metrics.mixing[-1].layers] for run in runs]
    final = last_weights(outcome)
    study, scale = outcome.plan.study, outcome.plan.scale
    theirs = find_published(study.published)
    paper: Layers = [{k: v / 100 for k, v in row.values.items()} for row in theirs]
    contrasts: dict[str, list[Contrast]] = {}
    for who, models in (
        (f"ours ({scale.name}, weights)", final),
        (f"ours ({scale.name}, effective shares)", effective),
        ("paper (one model)", [paper] if paper else []),
    ):
        found = [sandwich(models, name, sign) for name, sign in EXPECTED.items()] if models else []
        contrasts[who] = [each for each in found if each is not None]
    names = list(final[0][0]) if final else []
    drift = {name: [settled(history, name) for history in histories] for name in names}
    sentences = [
        f"Over the last {min(LAST, len(histories[0]))} checkpoints no layer's {name} weight moved "
        f"by more than {max(moved):.2f} points (over {len(moved)} seeds)."
        for name, moved in drift.items()
    ]
    sentences += [tell(each, who) for who, found in contrasts.items() for each in found]
    return Shares(
        _table(outcome, final, theirs),
        sentences,
        {
            "last_checkpoints": LAST,
            "weights": final,
            "effective": effective,
            "drift_points": drift,
            "sandwich": {
                who: [each.to_dict() for each in found] for who, found in contrasts.items()
            },
        },
    )


def _table(outcome: Outcome, models: Sequence[Layers], theirs: Sequence[Published]) -> TextTable:
    names = list(dict.fromkeys(name for layers in models for layer in layers for name in layer))
    scale, seeds = outcome.plan.scale, len(models)
    sections = []
    if models:
        rows = []
        for index in range(len(models[0])):
            of_layer = [layers[index] for layers in models]
            cells = [_cell([layer[name] for layer in of_layer if name in layer]) for name in names]
            rows.append([f"layer {index}", *cells])
        every = [layer for layers in models for layer in layers]
        about = f"{scale.words}, {outcome.tokens} tokens seen, {seeds} seeds"
        sections.append(Section("ours", about, [*rows, _average(every, names)]))
    if theirs:
        paper = [{name: value / 100 for name, value in row.values.items()} for row in theirs]
        rows = [
            [row.label, *(_cell([layer[name]]) for name in names)]
            for row, layer in zip(theirs, paper, strict=True)
        ]
        rows.append(_average(paper, names))
        sections.append(Section("paper", "PHA-180M, steps 48k to 58k", rows))
    note = (
        f"Mean over the last {LAST} checkpoints, then mean ± standard deviation over seeds. "
        "Weights are those of Eq. 4; effective shares, which count the gains of the norms, are in "
        "study.json."
    )
    return TextTable("Mixing weights by layer, %", ["layer", *names], sections, [note])


def _cell(shares: Sequence[float]) -> str:
    return summarise([100 * share for share in shares]).show(1) if shares else DASH


def _average(layers: Layers, names: Sequence[str]) -> list[str]:
    means = [summarise([100 * layer[n] for layer in layers if n in layer]).mean for n in names]
    return ["average", *(f"{mean:.1f}" for mean in means)]
