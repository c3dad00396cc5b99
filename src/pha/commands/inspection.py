"""Verbs that look at models, runs and machines: params, mixing, report, doctor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from pha.commands.common import File, Json, Model, answer, figures_table
from pha.utils.errors import PHAError


def params(
    presets: Sequence[Annotated[str, "PRESET"]] = (),
    *,
    vocab_size: int = 50257,
    length: int | None = None,
    json: Json = False,
) -> None:
    """Parameters of every preset by component, and what it costs at a length.

    Args:
        presets: only these
        vocab_size: V, by default GPT-2's
        length: also MFLOP to train on a token, and kB kept of a sequence (float32), at this length
    """
    from pha import mixers as mixers  # which makes them known
    from pha.costs import cache_bytes, training_flops
    from pha.model.parameters import count_parameters
    from pha.model.presets import PAPER_PARAMETERS, PRESETS, preset_config

    columns = ["total", "paper", "diff", "embed", "mixer", "attn", "aux_ffn", "ffn"]
    if length is not None:
        if length < 1:
            raise PHAError(f"--length {length}: at least 1 token")
        columns += ["MFLOP", "kB"]
    table = figures_table(f"millions of parameters, V = {vocab_size}", "preset", *columns, gap=0)
    rows: list[dict[str, Any]] = []
    for name in presets or PRESETS:
        config = preset_config(name, vocab_size=vocab_size)
        components = count_parameters(config)
        costs = {}
        if length is not None:
            flops, kept = training_flops(config, length), cache_bytes(config, length)
            costs = {"length": length, "flops_per_token": flops, "cache_bytes": kept}
        total = sum(components.values())
        # The paper's counts are those of its own vocabulary.
        paper = PAPER_PARAMETERS.get(name) if vocab_size == 50257 else None
        difference = None if paper is None else total / paper - 1
        rows.append(
            {
                "preset": name,
                "total": total,
                "non_embedding": total - components["embedding"],
                "components": components,
                "paper": paper,
                "difference": difference,
                **costs,
            }
        )
        part = Counter(components)
        parts = ("embedding", "mixer", "attention", "aux_ffn", "primary_ffn")
        # Eq. 2 or what stands in its place: no preset has two.
        part["mixer"] = total - part["norms_and_mixing"] - sum(part[p] for p in parts)
        digits = 1 if total > 2e7 else 2
        table.add_row(
            name,
            f"{total / 1e6:.{digits}f}",
            "" if paper is None else f"{paper / 1e6:.1f}",
            "" if difference is None else f"{difference:+.2%}",
            *(f"{part[p] / 1e6:.{digits}f}" if part[p] else "" for p in parts),
            *([f"{flops / 1e6:,.0f}", f"{kept / 1e3:,.0f}"] if costs else []),
        )
    answer(json, {"vocab_size": vocab_size, "presets": rows}, table)


def mixing(model: Model, *, json: Json = False) -> None:
    """Mixing weights and effective shares per layer.

    Args:
        model: a run, a checkpoint or a saved model; of a run, its history too
    """
    from pha.loading import load_model
    from pha.report.tables import mixing_history_table, mixing_table
    from pha.results import LayerMixing
    from pha.runs import RunFolder

    records = RunFolder(model).read_metrics().mixing
    final = load_model(model).pha.model.mixing_weights()
    if not final:
        raise PHAError(f"{model} has sequential blocks, which mix nothing")
    layers = [LayerMixing(**layer) for layer in final]
    tables = [mixing_table(layers, f"{model}: weight (effective share)")]
    if len(records) > 1:
        tables.append(mixing_history_table(records))
    history = [asdict(record) for record in records]
    answer(json, {"final": final, "over_time": history}, *tables)


def report(
    runs: Sequence[Annotated[Path, "RUN"]], *, out: File | None = None, title: str | None = None
) -> None:
    """One self-contained HTML page about runs.

    Args:
        runs: folders of finished runs
        out: the page (report.html in the first run)
        title: its heading
    """
    from pha.report.page import write_report

    print(write_report(runs, out or runs[0] / "report.html", title=title))


def doctor(*, json: Json = False) -> None:
    """Versions, devices and a self-check of every backend."""
    from pha.bench.doctor import examine

    findings = examine()
    answer(json, findings, _doctor_table(findings))
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
        if check.get("limits"):
            state += f"; {check['limits']}"
        table.add_row(
            f"{check['op']} on {check['device']}",
            f"{check['backend']}{used}: {state}",
        )
    return table
