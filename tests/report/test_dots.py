from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from pha.report.dots import Dots, dot_plot, save_picture


def test_numbers_go_on_a_logarithmic_line_where_they_span_much() -> None:
    series = [Dots("", {"1e-3": [3.0, 4.0], "1e-2": [2.0]})]
    axes = dot_plot(series, "rate", "perplexity").axes[0]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-3", "1e-2"]
    (line, *_) = axes.get_lines()
    assert list(line.get_xdata()) == [1e-3, 1e-2]
    assert list(line.get_ydata()) == [3.5, 2.0]


def test_words_stand_side_by_side_and_series_have_a_legend() -> None:
    series = [Dots("seq 1", {"pha": [1.0], "gss": [2.0]}), Dots("seq 2", {"pha": [1.5]})]
    figure = dot_plot(series, "preset", "perplexity")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["pha", "gss"]
    assert [entry.get_text() for entry in figure.legends[0].get_texts()] == ["seq 1", "seq 2"]


def test_pictures_are_saved_in_both_forms(tmp_path: Path) -> None:
    figure = dot_plot([Dots("", {"2": [1.0], "4": [2.0]})], "x", "y")
    svg, png = save_picture(figure, tmp_path / "deep" / "picture", "what is seen")
    assert ElementTree.parse(svg).getroot().find("{http://www.w3.org/2000/svg}title") is not None
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in svg.parent.iterdir()) == ["picture.png", "picture.svg"]
