"""One table in four formats, and the tables of runs."""

from __future__ import annotations

import csv
import io
from typing import Any

from rich.console import Console

from pha.report.collect import collect
from pha.report.compare import Best
from pha.report.tables import (
    Section,
    TextTable,
    mixing_history_table,
    mixing_table,
    results_table,
)
from pha.results import LayerMixing, MixingRecord
from tests.report.conftest import MakeRun

TABLE = TextTable(
    "A & [b]",
    ["model", "perplexity", "accuracy, %"],
    [
        Section("ours", "scale tiny", [["x_1", Best("16.5 ± 0.1"), "45"]]),
        Section("quoted", "WikiText", [["old†", "18.0", "–"], ["a|b", "", "1"]], [True, False]),
    ],
    ["† not like for like: 50% [more] data."],
)
LAYERS = [
    LayerMixing({"gss": 0.5, "aux_ffn": 0.5}, {"gss": 0.75, "aux_ffn": 0.25}),
    LayerMixing({"attention": 1.0}, {"attention": 1.0}),
    LayerMixing({"gss": 0.3, "aux_ffn": 0.7}, {"gss": 0.25, "aux_ffn": 0.75}),
]


def printed(table: TextTable, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(table: TextTable) -> list[list[str]]:
    return [row[1:] for row in csv.reader(io.StringIO(table.to_csv()))]


def test_markdown_has_as_many_cells_in_every_row() -> None:
    lines = [line for line in TABLE.to_markdown().split("\n") if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}
    assert "| *old†* | *18.0* | *–* |" in lines
    assert "| **ours: scale tiny** |  |  |" in lines
    assert "| x_1 | **16.5 ± 0.1** | 45 |" in lines


def test_latex_escapes_and_greys() -> None:
    latex = TABLE.to_latex()
    assert r"\caption{A \& [b]}" in latex
    assert r"x\_1 & \textbf{16.5 $\pm$ 0.1} & 45 \\" in latex
    assert r"\textcolor{gray}{old$\dagger$}" in latex
    assert r"50\% [more] data." in latex


def test_csv_reads_back() -> None:
    found = list(csv.reader(io.StringIO(TABLE.to_csv())))
    assert found[0] == ["from", "model", "perplexity", "accuracy, %"]
    assert found[1] == ["ours: scale tiny", "x_1", "16.5 ± 0.1", "45"]
    assert len(found) == 4


def test_the_terminal_shows_sections_and_notes_as_they_are() -> None:
    shown = printed(TABLE)
    for word in ("A & [b]", "ours", "quoted", "old†", "a|b", "16.5 ± 0.1", *TABLE.notes):
        assert word in shown


def test_a_narrow_terminal_gets_every_cell_whole() -> None:
    shown = printed(TABLE, width=24)
    assert shown.count("x_1") == 2
    assert "16.5 ± 0.1" in shown
    headings = ["model", "seeds", "validation, per token", "test, per token", "per word"]
    cells = ["learning_rate 1e-3", "1", "132.43", "130.77", "8,186,181"]
    wide = TextTable("A", [*headings, "bits/byte"], [Section("ours", "", [[*cells, "7.0306"]])])
    assert all(cell in printed(wide, width=80) for cell in (*cells, "bits/byte", "7.0306"))


def test_layers_with_different_branches_share_a_table() -> None:
    assert rows(mixing_table(LAYERS, "a run")) == [
        ["layer", "gss", "aux_ffn", "attention"],
        ["0", "50.0% (75.0%)", "50.0% (25.0%)", "–"],
        ["1", "–", "–", "100.0% (100.0%)"],
        ["2", "30.0% (25.0%)", "70.0% (75.0%)", "–"],
        ["mean", "40.0% (50.0%)", "60.0% (50.0%)", "–"],
    ]
    records = [MixingRecord(step=1000 * i, tokens=0, layers=LAYERS[: 2 + i]) for i in (0, 1)]
    assert rows(mixing_history_table(records)) == [
        ["step", "gss", "aux_ffn", "attention"],
        ["0", "50.00%", "50.00%", "–"],
        ["1,000", "40.00%", "60.00%", "–"],
    ]


def test_results_stand_side_by_side_with_the_best_in_bold(make_run: MakeRun) -> None:
    def change(result: dict[str, Any]) -> None:
        evaluation = result["evaluations"][0]
        result |= {"name": "[b]", "chosen": "average"}
        result["candidates"] = [
            {"name": name, "steps": [1], "validation_perplexity": 1.0, "evaluation": evaluation}
            for name in ("best checkpoint", "average")
        ]

    runs = collect([make_run("a", change=change), make_run("b", floor=3.0)])
    table = results_table([run.result for run in runs if run.result is not None])
    by_name = {row[0]: row[1:] for row in table.sections[0].rows}
    assert table.headings == ["", "[b]", "b"]
    assert by_name["perplexity per token"] == ["20.29", "22.42"]
    assert [type(cell) for cell in by_name["perplexity per token"]] == [Best, str]
    assert by_name["parameters"] == ["3,104,256"] * 2
    assert by_name["perplexity, average"] == ["20.29 (chosen)", "–"]
    assert "[b]" in printed(table)
