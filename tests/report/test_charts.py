"""The figures of comparisons: what is drawn, and where."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from pha.evals.compare import BinDifference, Interval, PairedComparison
from pha.report import charts
from pha.report.plots import LIGHT, MUTED, to_svg
from pha.results import Evaluation


def paired(differences: np.ndarray, **changes: Any) -> PairedComparison:
    def entry(label: str, mean: float, half_width: float | None) -> BinDifference:
        return BinDifference(label, 0.25, 4.0 + mean, 4.0, Interval(mean, half_width, 40, 1000))

    scores: dict[str, Any] = dict.fromkeys((each.name for each in fields(Evaluation)), 1.0)
    values: dict[str, Any] = {
        "a": "runs/one",
        "b": "runs/$x_2$ <&>",
        "evaluations": tuple(
            Evaluation(**scores | {"perplexity": perplexity}) for perplexity in (58.5, 60.3)
        ),
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
    return PairedComparison(**values | changes)


def bars(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_every_bin_with_an_interval_is_drawn() -> None:
    figure = charts.paired_figure(paired(np.random.default_rng(0).normal(-0.03, 0.02, 60)))
    blocks, context, recall = figure.axes
    assert sum(bar.get_height() for bar in bars(blocks)) == 60
    for bar in bars(blocks):  # none lies on both sides of zero
        left = bar.get_x()
        assert left + bar.get_width() <= 1e-9 or left >= -1e-9
    labels = [label.get_text() for label in context.get_yticklabels()]
    assert labels == ["1–32  (25%)", "33–64  (25%)", "65–96  (25%)"]
    colors = [line.get_color() for line in context.get_lines() if line.get_marker() in "osD"]
    assert colors == [LIGHT["series-0"], LIGHT["series-1"], MUTED]
    assert [label.get_text() for label in recall.get_yticklabels()] == ["new  (25%)"]
    assert context.get_xlim() == recall.get_xlim()
    low, high = context.get_xlim()
    assert low < -0.3
    assert 0.4 < high < 1  # a bin without an interval sets no scale


def test_names_and_verdict_are_in_picture_and_words() -> None:
    result = paired(np.random.default_rng(0).normal(-0.03, 0.02, 60))
    svg = to_svg(charts.paired_figure(result), charts.describe(result))
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "runs/$x_2$ <&>" in text
    assert "A is better by 0.0300 ± 0.0060 nats per token" in text
    assert "33–64 +0.300" in charts.describe(result)


@pytest.mark.parametrize(
    "differences", [np.zeros(25), np.full(25, 0.1), np.full(25, -1e-7), np.linspace(-9, 1, 500)]
)
def test_any_differences_can_be_drawn(differences: np.ndarray) -> None:
    figure = charts.paired_figure(paired(differences, breakdowns={}))
    (blocks,) = figure.axes
    assert sum(bar.get_height() for bar in bars(blocks)) == len(differences)
    low, high = blocks.get_xlim()
    assert low < 0 < high


def test_names_cover_no_other() -> None:
    names = [f"model {index}" for index in range(9)]
    points = [
        charts.Point(name, 1e6 + 1e5 * (index % 3), [5.0 + index / 50, 5.2 + index / 50])
        for index, name in enumerate(names)
    ]
    points.append(charts.Point("one far off", 3e6, [9.0, 9.1], grey=True))
    (axes,) = charts.against_size([("ours", points)], "perplexity").axes
    assert sorted(text.get_text() for text in axes.texts) == sorted([*names, "one far off"])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    marks = axes.transData.transform([(point.x, fmean(point.values)) for point in points])
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    rings = [
        line for line in axes.lines if line.get_marker() == "o" and np.size(line.get_xdata()) == 2
    ]
    assert len(rings) == len(points)


def test_seeds_means_and_divergence_over_a_setting() -> None:
    rates = [
        charts.Rate("pha", {"1e-3": [3.0, 4.0], "1e-2": []}, {"1e-2": 2}),
        charts.Rate("gss", {"1e-3": [2.0]}, {}),
    ]
    figure = charts.over_settings(rates, "rate", "perplexity")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-3", "1e-2"]
    mean, seeds, lost, *_ = axes.get_lines()
    assert np.asarray(mean.get_ydata()).tolist() == [3.5]
    assert np.asarray(seeds.get_ydata()).tolist() == [3.0, 4.0]
    assert (lost.get_marker(), np.size(lost.get_xdata())) == ("x", 1)
    assert [entry.get_text() for entry in figure.legends[0].get_texts()] == ["pha", "gss"]


def test_lines_are_where_the_numbers_are() -> None:
    lines = {"a": [(512, 10.0, 9.0, 12.0), (1024, 5.0, 5.0, 6.0)], "b": [(1024, 7.0, 7.0, 7.0)]}
    (axes,) = charts.over_lengths(lines, "tokens/s").axes
    (a, _, bars), (b, _, _) = axes.containers
    assert a.get_xydata().tolist() == [[512, 10], [1024, 5]]
    assert b.get_xydata().tolist() == [[1024, 7]]
    (segments,) = [bar.get_segments() for bar in bars]
    assert [segment.tolist() for segment in segments] == [
        [[512, 9], [512, 12]],
        [[1024, 5], [1024, 6]],
    ]
    assert axes.get_ylim()[0] == 0


def speed(model: str, length: int, speed: float, **changes: Any) -> dict[str, Any]:
    return {
        "mode": "train",
        "model": model,
        "backend": "",
        "error": None,
        "compiled": False,
        "precision": "fp32",
        "batch": 2,
        "length": length,
        "tokens_per_second": {"low": 0.9 * speed, "median": speed, "high": 1.2 * speed},
        "peak_memory": 3e9,
    } | changes


def test_there_is_a_picture_for_each_setting_with_several_lengths(tmp_path: Path) -> None:
    rows = [
        *(speed(model, length, 100.0) for model in ("a", "b") for length in (512, 1024)),
        speed("a", 512, 50.0, compiled=True),
        speed("a", 1024, 50.0, compiled=True),
        speed("a", 512, 50.0, precision="bf16"),  # the other length failed
        speed("a", 1024, 50.0, precision="bf16", error="out of memory"),
    ]
    rows.append(speed("a", 2048, 70.0, mode="prefill"))  # of another mode, with one length
    written = charts.save_speed_plots(rows, tmp_path / "deep")
    stems = [
        f"train-{measure}-fp32-b2{suffix}"
        for suffix in ("", "-compiled")
        for measure in ("throughput", "memory")
    ]
    assert [path.name for path in written] == [
        f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")
    ]
    assert all(path.stat().st_size > 1000 for path in written)
    assert sorted(written) == sorted((tmp_path / "deep").iterdir())
    assert "tokens/s of train against length, fp32, batch 2" in written[0].read_text()


def test_several_batches_of_a_length_make_a_picture_over_the_batch(tmp_path: Path) -> None:
    rows = [speed("a", 512, 100.0, batch=batch) for batch in (4, 2, 8)]
    written = charts.save_speed_plots(rows, tmp_path)
    assert {path.stem for path in written} == {
        f"train-{measure}-fp32-t512" for measure in ("throughput", "memory")
    }
    assert "tokens/s of train against batch, fp32, length 512" in written[0].read_text()
