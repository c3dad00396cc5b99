"""Figures: valid, self-contained, deterministic SVG that may share a page."""

from __future__ import annotations

import random
import re
from xml.etree import ElementTree

import matplotlib
import pytest

from pha.report import figures, plots
from pha.utils.text import count, duration, flop, memory, perplexity, printable, shorten


def curve(color: int = 0, label: str = "a", points: int = 40) -> figures.Series:
    return figures.Series(label, [(1000 * i, 5.0 / (i + 1)) for i in range(points)], color)


def svg_of(*series: figures.Series, title: str = "Loss") -> str:
    return plots.to_svg(figures.learning_curves(series, "tokens", "loss"), title)


def texts_of(svg: str) -> list[str | None]:
    return [e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def test_svg_is_the_same_every_time_and_ignores_user_styles() -> None:
    first = svg_of(curve())
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert svg_of(curve()) == first


def test_svg_has_a_title_and_nothing_that_leaks_or_loads() -> None:
    svg = svg_of(curve(), title="Loss of <a> & b")
    root = ElementTree.fromstring(svg)
    assert root[0].text == "Loss of <a> & b"
    assert root.get("role") == "img"
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert not re.search(r'(href|src)="(?!#)', svg)


def test_colours_are_variables_with_the_light_palette_as_fallback() -> None:
    svg = svg_of(curve(color=1))
    assert f"var(--series-1, {plots.LIGHT['series-1']})" in svg
    assert not re.search(r"(fill|stroke): #", svg)
    assert plots.LIGHT.keys() == plots.DARK.keys()


def test_ids_of_two_figures_never_collide() -> None:
    svgs = [svg_of(curve(), title=title) for title in ("first", "second")]
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in svgs]
    assert not set(ids[0]) & set(ids[1])
    for svg, own in zip(svgs, ids, strict=True):
        assert set(re.findall(r"[(\"]#([^)\"]+)", svg)) <= set(own)


@pytest.mark.parametrize("label", ["$x^2$ & <b>", "\x00\x1b[31m", "_hidden", "#0072b2", "$"])
def test_any_run_name_may_be_in_a_legend(label: str) -> None:
    svg = svg_of(curve(label=label), curve(1, "other"))
    texts = texts_of(svg)
    assert printable(label) in texts


def test_long_lines_are_short_in_the_file_and_keep_their_spikes() -> None:
    noise = random.Random(0)
    points = [(float(i), 1.0 + 0.1 * noise.random()) for i in range(10_000)]
    points[4321] = (4321.0, -99.0)
    svg = svg_of(figures.Series("a", points, 0))
    (line,) = re.findall(r'd="(M [^"z]*L [^"z]{1000,})"', svg)
    heights = [float(y) for y in line.replace("M", "L").split("L")[1:] for y in [y.split()[1]]]
    assert len(heights) < 3000
    assert max(heights) - sorted(heights)[-2] > 50


def test_heat_map_prints_every_share_and_the_means() -> None:
    layers = [{"gss": 0.5, "attention": 0.5}, {"gss": 0.25, "attention": 0.5, "other": 0.25}]
    svg = plots.to_svg(figures.mixing_heat_map(layers, 0), "mixing")
    texts = texts_of(svg)
    for shown in ("gss", "attention", "other", "50.0", "25.0", "37.5", "–", "mean"):
        assert shown in texts


def test_constant_and_single_points_can_be_drawn() -> None:
    flat = figures.Series("flat", [(0.0, 0.0), (1.0, 0.0)], 0)
    assert "<svg" in svg_of(flat)
    assert "<svg" in svg_of(figures.Series("one", [(5.0, 2.0)], 0))


def test_numbers_read_well() -> None:
    assert [perplexity(v) for v in (2.3141, 18.234, 164.94, 50257.4, None)] == [
        "2.314",
        "18.23",
        "164.9",
        "50,257",
        "–",
    ]
    counts = [count(v) for v in (999, 97_012, 3_104_256, 999_960, 1.5e12, 1.068e18)]
    assert counts == ["999", "97.0k", "3.10M", "1.00M", "1.50T", "1.07E"]
    assert [duration(v) for v in (8.24, 59.97, 195, 7440, 97200)] == [
        "8.2 s",
        "1 min 00 s",
        "3 min 15 s",
        "2 h 04 min",
        "1 d 03 h",
    ]
    assert [flop(v) for v in (812, 31.6e9)] == ["812 FLOP", "31.6 GFLOP"]
    assert [memory(v) for v in (1.5e9, 9.996e8, 6.4e8)] == ["1.50 GB", "1.00 GB", "640 MB"]


def test_control_characters_are_drawn() -> None:
    assert printable("a\tb\nc\x00\x1b\x7f\x85\ud800") == "a\tb\nc\u2400\u241b\u2421\ufffd\ufffd"
    assert shorten("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"
