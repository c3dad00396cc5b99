"""Shares of the branches over layers: are they settled, and do they make a sandwich?

The paper reads Table 9 as a sandwich: GSS leads at both ends of the stack, attention rises in the
middle. Here that is a contrast, the mean share in the outer layers minus that in the inner ones,
tested two ways: over seeds (Student's t), and within one model over all ways to choose the outer
layers (an exact permutation test, whose p can be no smaller than one over their number).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pha.report.figures import branch_names
from pha.report.tables import Section, TextTable
from pha.results import MixingRecord
from pha.studies.outcome import Outcome
from pha.studies.published import find_published
from pha.studies.seeds import LEVEL, Summary, p_of_mean, summarise
from pha.utils.text import DASH

LAST = 5  # checkpoints over which shares must be settled

Layers = Sequence[dict[str, float]]
"""Branch -> share, from 0 to 1, of each layer."""

Sign = Literal["positive", "negative"]
EXPECTED: dict[str, Sign] = {"gss": "positive", "attention": "negative"}
"""The sign of outer minus inner in a sandwich."""


@dataclass(frozen=True)
class Contrast:
    """Outer minus inner layers, of one branch."""

    branch: str  # name
    expected: Sign  # what a sandwich predicts of the sign
    points: list[float]  # percentage points for each seed
    summary: Summary  # over seeds
    p_seeds: float | None  # two-sided, that the mean over seeds is zero; None for one seed
    p_layers: float  # two-sided, of the mean over seeds, over the ways to choose the outer layers
    smallest_p_layers: float  # the smallest value that this test can give with so many layers

    @property
    def verdict(self) -> Literal["holds", "against", "undecided"]:
        """What the test over seeds says; with one seed, the one over layers."""
        p = self.p_layers if self.p_seeds is None else self.p_seeds
        if p >= LEVEL:
            return "undecided"
        return "holds" if (self.summary.mean > 0) == (self.expected == "positive") else "against"

    def sentence(self, who: str) -> str:
        """What the tests say of the models called `who`."""
        over = self.summary
        size = f"{abs(over.mean):.1f}"
        tests = f"p = {self.p_layers:.3f} over layers, at least {self.smallest_p_layers:.3f}"
        if over.interval is not None:
            size += f" ± {over.interval:.1f}"
            tests = f"95% interval and p = {self.p_seeds:.3f} over {over.n} seeds; {tests}"
        meaning = {
            "holds": "supports the sandwich",
            "against": "speaks against the sandwich",
            "undecided": "decides nothing",
        }[self.verdict]
        return (
            f"{who}: {self.branch} has {size} points {'more' if over.mean > 0 else 'less'} share "
            f"in the outer layers than in the inner ones, which {meaning} ({tests})."
        )


def outer_layers(layers: int) -> np.ndarray:
    """(layers,) whether each is among the outer ones: a quarter, at least one, at either end."""
    each = max(1, layers // 4)
    place = np.arange(layers)
    return (place < each) | (place >= layers - each)


def sandwich(models: Sequence[Layers], branch: str, expected: Sign) -> Contrast | None:
    """Test the shares of a branch, given the layers of each seed.

    None where a stack has fewer than four layers that mix it.
    """
    from scipy import stats

    shares = [[100 * layer[branch] for layer in layers if branch in layer] for layers in models]
    count = len(shares[0])
    if any(len(row) != count for row in shares) or count < 4:
        return None
    by_seed, outer = np.array(shares), outer_layers(count)
    points = (by_seed[:, outer].mean(1) - by_seed[:, ~outer].mean(1)).tolist()
    mean = by_seed.mean(0)
    p_layers = stats.permutation_test(
        (mean[outer], mean[~outer]),
        lambda outside, inside, axis: np.abs(outside.mean(axis) - inside.mean(axis)),
        alternative="greater",  # of the absolute value: two-sided
        n_resamples=math.inf,  # all of them: exact
        batch=10_000,
    ).pvalue
    # Where half of the layers are outer ones, choosing the other half is as far from even.
    smallest = (2 if 2 * outer.sum() == count else 1) / math.comb(count, int(outer.sum()))
    p_seeds = p_of_mean(points)
    return Contrast(branch, expected, points, summarise(points), p_seeds, float(p_layers), smallest)


def settled(history: Sequence[Layers], branch: str) -> float:
    """Points that the share of a branch moved over the last checkpoints: the most of any layer."""
    last = history[-LAST:]
    moved = [
        np.ptp([layers[i][branch] for layers in last])
        for i, layer in enumerate(last[0])
        if branch in layer
    ]
    return 100 * float(max(moved, default=0.0))


def mean_layers(models: Sequence[Layers]) -> Layers:
    """Means by layer and branch, over models or checkpoints of the same branches."""
    return [
        {name: math.fsum(each[i][name] for each in models) / len(models) for name in layer}
        for i, layer in enumerate(models[0])
    ]


def _histories(outcome: Outcome) -> list[list[MixingRecord]]:
    return [each.mixing for row in outcome.rows for each in row.histories() if each.mixing]


def _weights(records: Sequence[MixingRecord]) -> list[Layers]:
    return [[layer.weights for layer in record.layers] for record in records]


def last_weights(outcome: Outcome) -> list[Layers]:
    """Weights by layer of every finished run, each the mean over its last checkpoints."""
    return [mean_layers(_weights(records[-LAST:])) for records in _histories(outcome)]


def analyse(outcome: Outcome) -> tuple[TextTable, list[str], dict[str, Any]]:
    """Read the shares of every finished run of a study.

    Returns:
        A table of weights by layer, ours and the paper's; sentences on stability and the sandwich;
        and a record for JSON.
    """
    histories, scale = _histories(outcome), outcome.plan.scale
    effective = [[layer.effective for layer in records[-1].layers] for records in histories]
    final = last_weights(outcome)
    rows = find_published(outcome.plan.study.published)
    paper = {row.label: {name: v / 100 for name, v in row.values.items()} for row in rows}
    contrasts: dict[str, list[Contrast]] = {}
    for who, models in (
        (f"ours ({scale.name}, weights)", final),
        (f"ours ({scale.name}, effective shares)", effective),
        ("paper (one model)", [list(paper.values())] if paper else []),
    ):
        found = [sandwich(models, name, sign) for name, sign in EXPECTED.items()] if models else []
        contrasts[who] = [each for each in found if each is not None]
    names = branch_names(final[0]) if final else []
    drift = {name: [settled(_weights(each), name) for each in histories] for name in names}
    sentences = [
        f"Over the last {min(LAST, len(histories[0]))} checkpoints no layer's {name} weight moved "
        f"by more than {max(moved):.2f} points (over {len(moved)} seeds)."
        for name, moved in drift.items()
    ]
    sentences += [each.sentence(who) for who, found in contrasts.items() for each in found]
    record = {
        "last_checkpoints": LAST,
        "weights": final,
        "effective": effective,
        "drift_points": drift,
        "sandwich": {
            who: [asdict(each) | {"verdict": each.verdict} for each in found]
            for who, found in contrasts.items()
        },
    }
    sections = []
    if final:
        by_layer = {f"layer {i}": [model[i] for model in final] for i in range(len(final[0]))}
        about = f"{scale.words}, {outcome.tokens} tokens seen, {len(final)} seeds"
        sections.append(Section("ours", about, _rows(by_layer, names)))
    if paper:
        by_layer = {label: [layer] for label, layer in paper.items()}
        about = "PHA-180M, steps 48k to 58k"
        sections.append(Section("paper", about, _rows(by_layer, names)))
    note = (
        f"Mean over the last {LAST} checkpoints, then mean ± standard deviation over seeds. "
        "Weights are those of Eq. 4; effective shares, which count the gains of the norms, are in "
        "study.json."
    )
    table = TextTable("Mixing weights by layer, %", ["layer", *names], sections, [note])
    return table, sentences, record


def _rows(by_layer: dict[str, list[dict[str, float]]], names: Sequence[str]) -> list[list[str]]:
    """A row for each layer, of shares of one seed or several, and their average."""

    def shares(layers: Layers, name: str) -> Summary | None:
        found = [100 * layer[name] for layer in layers if name in layer]
        return summarise(found) if found else None

    every = [layer for layers in by_layer.values() for layer in layers]
    rows = [
        [label, *(DASH if (s := shares(layers, name)) is None else s.show(1) for name in names)]
        for label, layers in by_layer.items()
    ]
    means = [shares(every, name) for name in names]
    return [*rows, ["average", *(DASH if s is None else f"{s.mean:.1f}" for s in means)]]
