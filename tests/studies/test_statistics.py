from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pha.studies.statistics import Summary, summarise


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
