"""The tables of the terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from pha.report.tables import mixing_history_table, mixing_table

LAYERS: list[dict[str, Any]] = [
    {"weights": {"gss": 0.5, "aux_ffn": 0.5}, "effective": {"gss": 0.75, "aux_ffn": 0.25}},
    {"weights": {"attention": 1.0}, "effective": {"attention": 1.0}},
    {"weights": {"gss": 0.3, "aux_ffn": 0.7}, "effective": {"gss": 0.25, "aux_ffn": 0.75}},
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
    records = [{"step": 0, "layers": LAYERS[:2]}, {"step": 1000, "layers": LAYERS}]
    assert rows(mixing_history_table(records)) == [
        ["step", "gss", "aux_ffn", "attention"],
        ["0", "50.00%", "50.00%", "-"],
        ["1,000", "40.00%", "60.00%", "-"],
    ]
