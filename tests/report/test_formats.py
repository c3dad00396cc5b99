"""One table in four formats."""

from __future__ import annotations

import csv
import io

from rich.console import Console

from pha.report.formats import Section, TextTable

TABLE = TextTable(
    "A & B",
    ["model", "perplexity", "accuracy, %"],
    [
        Section("ours", "scale tiny", [["x_1", "16.5 ± 0.1", "45"]]),
        Section("quoted", "WikiText", [["old†", "18.0", "–"], ["a|b", "", "1"]], [True, False]),
    ],
    ["† not like for like: 50% [more] data."],
)


def test_markdown_has_as_many_cells_in_every_row() -> None:
    lines = [line for line in TABLE.to_markdown().split("\n") if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}
    assert "| *old†* | *18.0* | *–* |" in lines
    assert "| **ours: scale tiny** |  |  |" in lines


def test_latex_escapes_and_greys() -> None:
    latex = TABLE.to_latex()
    assert r"\caption{A \& B}" in latex
    assert r"x\_1 & 16.5 $\pm$ 0.1 & 45 \\" in latex
    assert r"\textcolor{gray}{old$\dagger$}" in latex
    assert r"50\% [more] data." in latex


def test_csv_reads_back() -> None:
    rows = list(csv.reader(io.StringIO(TABLE.to_csv())))
    assert rows[0] == ["from", "model", "perplexity", "accuracy, %"]
    assert rows[1] == ["ours: scale tiny", "x_1", "16.5 ± 0.1", "45"]
    assert len(rows) == 4


def test_the_terminal_shows_sections_and_notes_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=100)
    for part in TABLE.to_rich(100):
        console.print(part)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("A & B", "ours", "quoted", "old†", "a|b", "16.5 ± 0.1"):
        assert word in shown
    assert TABLE.below[-2:] == ["quoted: WikiText", *TABLE.notes]


def test_a_narrow_terminal_gets_every_cell_whole() -> None:
    console = Console(file=io.StringIO(), width=24)
    parts = TABLE.to_rich(24)
    assert len(parts) == 2
    for part in parts:
        console.print(part)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("x_1") == 2
    assert "16.5 ± 0.1" in shown
