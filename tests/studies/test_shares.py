"""Shares by layer: the sandwich is found where it is, denied where not, left open in noise."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pha.studies.outcome import Outcome
from pha.studies.published import find_published
from pha.studies.shares import LAST, last_weights, outer_layers, sandwich, settled


def model(gss: list[float]) -> list[dict[str, float]]:
    return [{"gss": share, "attention": 1 - share} for share in gss]


def test_outer_layers() -> None:
    places = [[i for i, outer in enumerate(outer_layers(n)) if outer] for n in (3, 4, 10)]
    assert places == [[0, 2], [0, 3], [0, 1, 8, 9]]


def test_a_contrast_by_hand() -> None:
    models = [model([0.5, 0.3, 0.3, 0.4]), model([0.6, 0.3, 0.4, 0.5])]
    found = sandwich(models, "gss", "positive")
    assert found is not None
    assert found.points == pytest.approx((15.0, 20.0))
    # Six ways to choose two of four layers. Two of them, {0, 3} and {1, 2}, are as extreme.
    assert found.p_layers == found.smallest_p_layers == pytest.approx(2 / 6)


def test_the_verdict_follows_the_data() -> None:
    seeds = [0.0, 0.01, -0.01]
    clear = sandwich([model([0.5 + s, 0.3, 0.3, 0.5]) for s in seeds], "gss", "positive")
    assert clear is not None
    assert clear.verdict == "holds"
    assert "supports the sandwich" in clear.sentence("ours")
    reverse = sandwich([model([0.3, 0.5 + s, 0.5, 0.3]) for s in seeds], "gss", "positive")
    assert reverse is not None
    assert reverse.verdict == "against"
    mixed = sandwich([model([0.4 + 9 * s, 0.4, 0.4, 0.4]) for s in seeds], "gss", "positive")
    assert mixed is not None
    assert mixed.verdict == "undecided"


def test_noise_is_rarely_called_a_sandwich() -> None:
    source = random.Random(0)
    runs = [
        sandwich([model([source.random() for _ in range(4)]) for _ in range(3)], "gss", "positive")
        for _ in range(400)
    ]
    wrong = sum(each is not None and each.verdict != "undecided" for each in runs)
    assert 4 <= wrong <= 36  # 5% of 400 is 20


def test_table_9_of_the_paper() -> None:
    rows = [{k: v / 100 for k, v in row.values.items()} for row in find_published(["table-9"])]
    found = sandwich([rows], "gss", "positive")
    assert found is not None
    # (54.0 + 53.2 + 47.6 + 54.6) / 4 - (52.4 + 43.9 + 39.9 + 42.5 + 39.1 + 41.8) / 6
    assert found.summary.mean == pytest.approx(209.4 / 4 - 259.6 / 6)
    assert found.p_seeds is None
    assert found.smallest_p_layers == pytest.approx(1 / 210)
    assert found.verdict == "holds"


def test_stacks_without_a_middle_are_not_tested() -> None:
    assert sandwich([model([0.5, 0.4, 0.5])], "gss", "positive") is None
    assert sandwich([[{"attention": 1.0}] * 5], "gss", "positive") is None


def test_settled_is_the_largest_range_over_the_last_checkpoints() -> None:
    history = [model([0.9, 0.1]), *(model([0.50 + 0.01 * i, 0.3]) for i in range(5))]
    assert settled(history, "gss") == pytest.approx(4.0)


def test_last_weights_are_means_over_the_last_checkpoints_of_each_run() -> None:
    def run(*gss: float) -> Any:
        points = [
            SimpleNamespace(layers=[SimpleNamespace(weights={"gss": g, "aux_ffn": 1 - g})])
            for g in gss
        ]
        return SimpleNamespace(mixing=points)

    runs = [run(0.9, 0.9, *[0.1 * i for i in range(LAST)]), run(0.5), run()]
    row = SimpleNamespace(histories=lambda: runs)
    first, second = last_weights(cast(Outcome, SimpleNamespace(rows=[row])))
    assert first[0]["gss"] == pytest.approx(0.1 * (LAST - 1) / 2)
    assert second == [{"gss": 0.5, "aux_ffn": 0.5}]
