"""Pictures of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pha.report.speed import length_plot, save_speed_plots


def row(model: str, length: int, speed: float, **changes: Any) -> dict[str, Any]:
    return {
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


def test_lines_are_where_the_numbers_are() -> None:
    lines = {"a": [(512, 10.0, 9.0, 12.0), (1024, 5.0, 5.0, 6.0)], "b": [(1024, 7.0, 7.0, 7.0)]}
    (axes,) = length_plot(lines, "tokens/s").axes
    (a, _, bars), (b, _, _) = axes.containers
    assert a.get_xydata().tolist() == [[512, 10], [1024, 5]]
    assert b.get_xydata().tolist() == [[1024, 7]]
    (segments,) = [bar.get_segments() for bar in bars]
    assert [segment.tolist() for segment in segments] == [
        [[512, 9], [512, 12]],
        [[1024, 5], [1024, 6]],
    ]
    assert axes.get_ylim()[0] == 0


def test_there_is_a_picture_for_each_setting_with_several_lengths(tmp_path: Path) -> None:
    rows = [
        *(row(model, length, 100.0) for model in ("a", "b") for length in (512, 1024)),
        row("a", 512, 50.0, compiled=True),
        row("a", 1024, 50.0, compiled=True),
        row("a", 512, 50.0, precision="bf16"),  # the other length failed
        row("a", 1024, 50.0, precision="bf16", error="out of memory"),
    ]
    written = save_speed_plots("train", rows, tmp_path)
    stems = [
        f"train-{measure}-fp32-b2{suffix}"
        for suffix in ("", "-compiled")
        for measure in ("throughput", "memory")
    ]
    assert [path.name for path in written] == [
        f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")
    ]
    assert all(path.stat().st_size > 1000 for path in written)
    assert "tokens/s of train against length, fp32, batch 2" in written[0].read_text()
