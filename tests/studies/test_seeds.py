"""Figures over seeds and paired differences: by hand, against scipy, and in words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pha.studies.seeds import (
    Difference,
    Summary,
    adjust,
    paired_difference,
    summarise,
)

LABELS = {"a": "parallel", "b": "sequential"}


def difference(of_a: list[float], of_b: list[float]) -> Difference:
    found = paired_difference("a", "b", "test", dict(enumerate(of_a)), dict(enumerate(of_b)))
    assert found is not None
    return found


def test_summary_agrees_with_scipy() -> None:
    values = [16.4, 16.7, 16.52, 16.48, 16.31]
    summary = summarise(values)
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.std == pytest.approx(np.std(values, ddof=1))
    low, high = stats.t.interval(0.95, 4, loc=summary.mean, scale=stats.sem(values))
    assert summary.interval == pytest.approx((high - low) / 2)


def test_one_seed_has_no_spread() -> None:
    assert summarise([3.0]) == Summary(1, 3.0, None, None)


@pytest.mark.parametrize(
    ("mean", "std", "shown"),
    [
        (16.512, 0.119, "16.51 ± 0.12"),
        (1234.5, 67.8, "1,234 ± 68"),
        (2.5e8, 1e6, "2.5e+08 ± 1,000,000"),
        (16.5, None, "16.50"),
    ],
)
def test_summaries_are_shown_with_sensible_digits(
    mean: float, std: float | None, shown: str
) -> None:
    assert Summary(3, mean, std, None).show() == shown


def test_a_difference_is_that_of_a_paired_t_test() -> None:
    a, b = [16.1, 16.4, 16.2, 16.9], [16.5, 16.6, 16.9, 17.0]
    found = difference(a, b)
    oracle = stats.ttest_rel(a, b)
    low, high = oracle.confidence_interval(0.95)
    assert found.mean == pytest.approx(-0.35)
    assert found.p == pytest.approx(oracle.pvalue)
    assert found.interval is not None
    assert found.mean - found.interval == pytest.approx(low)
    assert found.mean + found.interval == pytest.approx(high)
    assert found.verdict == ("lower" if oracle.pvalue < 0.05 else "undecided")


def test_only_shared_seeds_count() -> None:
    found = paired_difference("a", "b", "test", {0: 1.0, 2: 5.0, 3: 9.0}, {2: 4.0, 3: 8.5, 7: 0.0})
    assert found is not None
    assert found.seeds == [2, 3]
    assert found.mean == pytest.approx(0.75)
    assert paired_difference("a", "b", "test", {0: 1.0}, {1: 1.0}) is None


def test_what_the_data_say_is_said_and_no_more() -> None:
    clear = difference([16.30, 16.40, 16.50], [16.42, 16.53, 16.61])
    said = clear.sentence(LABELS, "test perplexity per token", 2, "at equal tokens")
    assert said == (
        "Parallel is lower than sequential by 0.12 ± 0.02 in test perplexity per token at equal "
        "tokens (95% interval, 3 paired seeds)."
    )
    open_ = difference([16.3, 16.6, 16.5], [16.4, 16.5, 16.6]).sentence(LABELS, "loss", 2)
    assert open_.startswith("The data do not decide between parallel and sequential in loss: -0.03")
    one = difference([1.0], [2.0]).sentence(LABELS, "loss", 1)
    assert one.startswith("Parallel is lower than sequential by 1.0 in loss, with one seed")
    same = difference([1.0, 2.0], [1.0, 2.0]).sentence(LABELS, "loss", 1)
    assert same == "Parallel and sequential are equal in loss (2 paired seeds)."
    assert difference([1.0, 2.0], [2.0, 3.0]).p == 0.0  # every seed by as much


def test_the_correction_is_holms() -> None:
    pairs = [
        ([1.0, 1.1, 1.2], [2.0, 2.2, 2.1]),
        ([1.0, 1.4, 1.2], [1.3, 1.5, 1.6]),
        ([5.0], [1.0]),
        ([1.0, 1.4, 1.2], [1.1, 1.3, 1.3]),
    ]
    found = adjust([difference(*pair) for pair in pairs])
    raw = [each.p for each in found if each.p is not None]
    ranked = sorted(raw)
    expected = []
    for p in raw:
        below = ranked.index(p)
        expected.append(min(1.0, max((3 - k) * ranked[k] for k in range(below + 1))))
    assert [each.p_adjusted for each in found if each.p is not None] == pytest.approx(expected)
    assert found[2].p_adjusted is None


def test_a_difference_that_the_correction_takes_back_says_so() -> None:
    weak = difference([1.0, 1.11, 1.2], [1.1, 1.2, 1.32])
    assert weak.verdict == "lower"
    assert weak.p is not None
    many = adjust([weak] * math.ceil(0.06 / weak.p))
    assert "correction" in many[0].sentence(LABELS, "loss", 2)
    assert "correction" not in adjust([weak])[0].sentence(LABELS, "loss", 2)
