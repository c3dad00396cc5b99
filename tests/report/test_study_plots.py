"""Plots of studies: where names stand, and what is drawn for each seed."""

from __future__ import annotations

import pytest

from pha.report.study_plots import Point, against_parameters


@pytest.mark.parametrize(("values", "sides"), [((3.0, 2.0, 1.0), "++-"), ((1.0, 2.0, 3.0), "--+")])
def test_names_stand_off_from_the_line(values: tuple[float, ...], sides: str) -> None:
    """The last name is too long for its right, where the line comes from the left."""
    names = ("a", "b", "a name of some length")
    points = [
        Point(name, 1e6 * (1 + place), [value - 0.1, value + 0.1])
        for place, (name, value) in enumerate(zip(names, values, strict=True))
    ]
    (axes,) = against_parameters([("ours", points)], "perplexity").axes
    low, high = axes.get_ylim()
    for text, value, side in zip(
        sorted(axes.texts, key=lambda each: names.index(each.get_text())),
        values,
        sides,
        strict=True,
    ):
        above = text.get_position()[1] > (value - low) / (high - low)
        assert above == (side == "+"), text.get_text()
    assert sum(line.get_markerfacecolor() == "none" for line in axes.lines) == len(points)
