"""Verbs that look at models, runs and machines: params, mixing, report, doctor."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pha.commands.common import AddVerb, console_for, print_json
from pha.utils.errors import PHAError


def add_params(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb("params", params, "parameters of every preset by component")
    sub.add_argument("presets", metavar="PRESET", nargs="*", help="only these")
    sub.add_argument("--vocab-size", type=int, default=50257, help="V (50257, GPT-2)")
    sub.add_argument("--json", action="store_true", help="print as JSON")


def add_mixing(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb("mixing", mixing, "mixing weights and effective shares per layer")
    sub.add_argument("run_path", metavar="RUN_OR_MODEL", type=Path)
    sub.add_argument("--json", action="store_true", help="print as JSON")


def add_report(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb("report", report, "one self-contained HTML page about runs")
    sub.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    sub.add_argument("--out", type=Path, help="the page (report.html in the first run)")
    sub.add_argument("--title", help="its heading")


def add_doctor(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb("doctor", doctor, "versions, devices and a self-check of every backend")
    sub.add_argument("--json", action="store_true", help="print as JSON")


def params(options: Namespace) -> None:
    """`pha params`."""
    from pha.model.parameters import count_parameters
    from pha.model.presets import PAPER_PARAMETERS, PRESETS, preset_config

    rows: list[dict[str, Any]] = []
    for name in options.presets or PRESETS:
        components = count_parameters(preset_config(name, vocab_size=options.vocab_size))
        total = sum(components.values())
        # The paper's counts are those of its own vocabulary.
        paper = PAPER_PARAMETERS.get(name) if options.vocab_size == 50257 else None
        rows.append(
            {
                "preset": name,
                "total": total,
                "non_embedding": total - components["embedding"],
                "components": components,
                "paper": paper,
                "difference": None if paper is None else total / paper - 1,
            }
        )
    if options.json:
        print_json({"vocab_size": options.vocab_size, "presets": rows})
        return
    table = Table(
        title=f"millions of parameters, V = {options.vocab_size}", box=box.SIMPLE_HEAD, padding=0
    )
    table.add_column("preset", no_wrap=True)
    for column in ("total", "paper", "diff", "embed", "gss", "attn", "aux_ffn", "ffn"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        paper, difference = row["paper"], row["difference"]
        components = row["components"]
        state_spaces = components.get("gss", 0) + components.get("mehta_gss", 0)
        others = [components.get(c, 0) for c in ("attention", "aux_ffn", "primary_ffn")]
        parts = [components["embedding"], state_spaces, *others]
        digits = 1 if row["total"] > 2e7 else 2
        table.add_row(
            row["preset"],
            f"{row['total'] / 1e6:.{digits}f}",
            "" if paper is None else f"{paper / 1e6:.1f}",
            "" if difference is None else f"{difference:+.2%}",
            *(f"{part / 1e6:.{digits}f}" if part else "" for part in parts),
        )
    Console().print(table)


def mixing(options: Namespace) -> None:
    """`pha mixing`."""
    from pha.loading import load_model
    from pha.results import LayerMixing
    from pha.runs import RunFolder

    records = RunFolder(options.run_path).read_metrics().mixing
    final = load_model(options.run_path).model.model.mixing_weights()
    if not final:
        raise PHAError(f"{options.run_path} has sequential blocks, which mix nothing")
    if options.json:
        print_json({"final": final, "over_time": [asdict(record) for record in records]})
        return
    from pha.report.tables import mixing_history_table, mixing_table

    console = Console()
    layers = [LayerMixing(**layer) for layer in final]
    console.print(mixing_table(layers, f"{options.run_path}: weight (effective share)"))
    if len(records) > 1:
        console.print(mixing_history_table(records))


def report(options: Namespace) -> None:
    """`pha report`."""
    from pha.report.page import write_report

    out = options.out or options.runs[0] / "report.html"
    print(write_report(options.runs, out, title=options.title))


def doctor(options: Namespace) -> None:
    """`pha doctor`."""
    from pha.bench.doctor import examine

    findings = examine()
    if options.json:
        print_json(findings)
    else:
        console_for(options).print(_doctor_table(findings))
    if not findings["healthy"]:
        raise PHAError("a backend fails or disagrees with its oracle; see the table")


def _doctor_table(findings: dict[str, Any]) -> Table:
    table = Table(title="pha doctor", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("finding")
    for name, value in findings["environment"].items():
        table.add_row(name, "-" if value is None else str(value))
    for check in findings["backends"]:
        used = " (used)" if check["used"] else ""
        state = check["reason"]
        if state is None:
            state = "ok" if check["ok"] else "WRONG"
            state += f", largest relative error {check['error']:.1e}"
        table.add_row(
            f"{check['op']} on {check['device']}",
            f"{check['backend']}{used}: {state}",
        )
    return table
