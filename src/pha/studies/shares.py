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
from pha.studies.sandwich import LAST, Contrast, Layers, sandwich, settled, tell

EXPECTED = {"gss": "positive", "attention": "negative"}
KINDS = {"weights": "mixing weight", "effective": "effective share"}


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


def last_weights(outcome: Outcome) -> list[Layers]:
    """Weights by layer of every finished run, each the mean over its last checkpoints."""
    return [_mean_of_last(history) for history in _histories(_runs(outcome))]


def analyse(outcome: Outcome) -> Shares:
    """Read the shares of every finished run of a study, over its last checkpoints."""
    runs = _runs(outcome)
    histories = _histories(runs)
    effective = [[layer.effective for layer in run.metrics.mixing[-1].layers] for run in runs]
    final = last_weights(outcome)
    theirs = find_published(outcome.plan.study.published)
    paper: Layers = [{k: v / 100 for k, v in row.values.items()} for row in theirs]
    contrasts: dict[str, list[Contrast]] = {}
    for who, models in (
        (f"ours ({outcome.plan.scale.name}, weights)", final),
        (f"ours ({outcome.plan.scale.name}, effective shares)", effective),
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


def _mean_of_last(history: Sequence[Layers]) -> Layers:
    last = history[-LAST:]
    return [
        {name: math.fsum(layers[i][name] for layers in last) / len(last) for name in last[0][i]}
        for i in range(len(last[0]))
    ]


def _table(outcome: Outcome, models: Sequence[Layers], theirs: Sequence[Published]) -> TextTable:
    names = list(dict.fromkeys(name for layers in models for layer in layers for name in layer))
    sections = []
    if models:
        rows = []
        for index in range(len(models[0])):
            cells = []
            for name in names:
                values = [100 * layers[index][name] for layers in models if name in layers[index]]
                cells.append(_mean_and_std(values))
            rows.append([f"layer {index}", *cells])
        columns = [
            [100 * layer[name] for layers in models for layer in layers if name in layer]
            for name in names
        ]
        rows.append(["average", *(f"{math.fsum(c) / len(c):.1f}" for c in columns)])
        about = (
            f"scale {outcome.plan.scale.name}, {outcome.tokens} tokens seen, {len(models)} seeds"
        )
        sections.append(Section("ours", about, rows))
    if theirs:
        columns = [[row.values[name] for row in theirs if name in row.values] for name in names]
        rows = [[row.label, *(f"{row.values[name]:.1f}" for name in names)] for row in theirs]
        rows.append(["average", *(f"{math.fsum(c) / len(c):.1f}" for c in columns)])
        sections.append(Section("paper", "PHA-180M, steps 48k to 58k", rows))
    note = (
        f"Mean over the last {LAST} checkpoints, then mean ± standard deviation over seeds. "
        "Weights are those of Eq. 4; effective shares, which count the gains of the norms, are in "
        "study.json."
    )
    return TextTable("Mixing weights by layer, %", ["layer", *names], sections, [note])


def _mean_and_std(values: Sequence[float]) -> str:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.1f} ± {std:.1f}"
