"""The tables of the terminal."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from pha.report.tables import mixing_history_table, mixing_table
from pha.results import LayerMixing, MixingRecord

LAYERS = [
    LayerMixing({"gss": 0.5, "aux_ffn": 0.5}, {"gss": 0.75, "aux_ffn": 0.25}),
    LayerMixing({"attention": 1.0}, {"attention": 1.0}),
    LayerMixing({"gss": 0.3, "aux_ffn": 0.7}, {"gss": 0.25, "aux_ffn": 0.75}),
]


def rows(table: Table) -> list[list[str]]:
    """The cells of what is printed, row by row."""
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def test_layers_with_different_branches_share_a_table() -> None:
    assert rows(mixing_table(LAYERS, "a run")) == [
        ["layer", "gss", "aux_ffn", "attention"],
        ["0", "50.0% (75.0%)", "50.0% (25.0%)", "-"],
        ["1", "-", "-", "100.0% (100.0%)"],
        ["2", "30.0% (25.0%)", "70.0% (75.0%)", "-"],
        ["mean", "40.0% (50.0%)", "60.0% (50.0%)", "-"],
    ]


def test_history_of_layers_with_different_branches() -> None:
    records = [MixingRecord(step=i * 1000, tokens=0, layers=LAYERS[: 2 + i]) for i in (0, 1)]
    assert rows(mixing_history_table(records)) == [
        ["step", "gss", "aux_ffn", "attention"],
        ["0", "50.00%", "50.00%", "-"],
        ["1,000", "40.00%", "60.00%", "-"],
    ]
