"""The shares of a study's runs: what of a history is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pha.studies.outcome import Outcome
from pha.studies.sandwich import LAST
from pha.studies.shares import last_weights


def test_last_weights_are_means_over_the_last_checkpoints_of_each_run() -> None:
    def run(*gss: float) -> Any:
        points = [
            SimpleNamespace(layers=[SimpleNamespace(weights={"gss": g, "aux_ffn": 1 - g})])
            for g in gss
        ]
        return SimpleNamespace(mixing_history=points)

    runs = [run(0.9, 0.9, *[0.1 * i for i in range(LAST)]), run(0.5), run()]
    row = SimpleNamespace(runs=lambda: runs)
    first, second = last_weights(cast(Outcome, SimpleNamespace(rows=[row])))
    assert first[0]["gss"] == pytest.approx(0.1 * (LAST - 1) / 2)
    assert second == [{"gss": 0.5, "aux_ffn": 0.5}]
