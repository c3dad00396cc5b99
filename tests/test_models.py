"""docs/models.md is what the presets have and cost and what results/ says."""

from __future__ import annotations

import re

import pytest

from pha.model.presets import PRESETS
from scripts.models_page import PAGE, TABLE, included, short, size_row, tables

TEXT = PAGE.read_text(encoding="utf-8")
STALE = "run `python -m scripts.models_page`"


def test_every_preset_has_one_row() -> None:
    sizes = TEXT.partition("## Measured here")[0]
    assert sorted(re.findall(r"^\| `([^`]+)`", sizes, re.M)) == sorted(PRESETS)


def test_figures_measured_here_are_those_of_results() -> None:
    shown = {match[2]: match[3] for match in TABLE.finditer(TEXT)}
    made = tables()
    assert shown.keys() == made.keys()
    for name in ("runs", "studies"):
        assert shown[name] == made[name](), STALE


@pytest.mark.parametrize("name", ["pha-tiny", "mamba2-tiny", "transformer-xl-tiny"])
def test_a_preset_has_and_costs_what_its_row_says(name: str) -> None:
    assert "| " + " | ".join(size_row(name)) + " |" in TEXT, STALE


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    assert included(TEXT) == TEXT, STALE


def test_a_command_is_without_places_and_seeds() -> None:
    command = "pha train a.b --out x/y --quiet --data.store stores/z --run.seed=3 --model.k 'a b'"
    assert short(command) == "pha train a.b --data STORE --model.k 'a b'"
