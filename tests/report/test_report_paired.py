"""The picture of a paired comparison."""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pha.evals.compare import BinDifference, Interval, PairedComparison
from pha.evals.perplexity import Evaluation
from pha.report.paired import describe, paired_figure
from pha.report.plots import LIGHT, to_svg


def evaluation(perplexity: float) -> Evaluation:
    names = [each.name for each in fields(Evaluation)]
    return Evaluation(**dict.fromkeys(names, 1.0) | {"perplexity": perplexity})


def entry(label: str, mean: float, half_width: float | None) -> BinDifference:
    return BinDifference(label, 0.25, 4.0 + mean, 4.0, Interval(mean, half_width, 40, 1000))


def comparison(differences: np.ndarray, **changes: Any) -> PairedComparison:
    fields: dict[str, Any] = {
        "a": "runs/one",
        "b": "runs/$x_2$ <&>",
        "evaluations": (evaluation(58.5), evaluation(60.3)),
        "difference": Interval(-0.03, 0.006, len(differences), 90_000),
        "bootstrap": (-0.036, -0.024),
        "block_tokens": 2048,
        "block_differences": differences,
        "breakdowns": {
            "context (tokens)": [
                entry("1–32", -0.2, 0.1),
                entry("33–64", 0.3, 0.1),
                entry("65–96", 0.01, 0.05),
            ],
            "token in its context": [entry("new", 0.02, 0.01), entry("rare", 40.0, None)],
        },
        "passages": [],
    }
    return PairedComparison(**fields | changes)


def test_every_bin_with_an_interval_is_drawn() -> None:
    differences = np.random.default_rng(0).normal(-0.03, 0.02, 60)
    figure = paired_figure(comparison(differences))
    blocks, context, recall, *_ = figure.axes
    assert sum(bar.get_height() for bar in blocks.patches) == 60
    for bar in blocks.patches:  # none lies on both sides of zero
        left = bar.get_x()
        assert left + bar.get_width() <= 1e-9 or left >= -1e-9
    labels = [label.get_text() for label in context.get_yticklabels()]
    assert labels == ["1–32  (25%)", "33–64  (25%)", "65–96  (25%)"]
    colors = [line.get_color() for line in context.get_lines() if line.get_marker() in "osD"]
    assert colors == [LIGHT["series-0"], LIGHT["series-1"], LIGHT["muted"]]
    assert [label.get_text() for label in recall.get_yticklabels()] == ["new  (25%)"]
    assert context.get_xlim() == recall.get_xlim()
    low, high = context.get_xlim()
    assert low < -0.3
    assert 0.4 < high < 1  # a bin without an interval sets no scale


def test_names_and_verdict_are_in_picture_and_words() -> None:
    result = comparison(np.random.default_rng(0).normal(-0.03, 0.02, 60))
    svg = to_svg(paired_figure(result), describe(result))
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "runs/$x_2$ <&>" in text
    assert "A is better by 0.0300 ± 0.0060 nats per token" in text
    assert "33–64 +0.300" in describe(result)


@pytest.mark.parametrize(
    "differences", [np.zeros(25), np.full(25, 0.1), np.full(25, -1e-7), np.linspace(-9, 1, 500)]
)
def test_any_differences_can_be_drawn(differences: np.ndarray) -> None:
    figure = paired_figure(comparison(differences, breakdowns={}))
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == len(differences)
    low, high = figure.axes[0].get_xlim()
    assert low < 0 < high
