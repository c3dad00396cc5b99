"""The tables of the terminal; the HTML page has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from pha.report.plots import branch_names, mean_share
from pha.results import Evaluation, LayerMixing, MixingRecord, RunResult
from pha.utils.text import duration, memory

Row = tuple[str, Callable[[RunResult, Evaluation], float], Callable[[float], str], Any]

# Heading, value of a result and its evaluation, how it is shown, which extreme is best.
ROWS: tuple[Row, ...] = (
    ("parameters", lambda r, e: r.model.parameters.total, lambda v: f"{v:,}", None),
    ("tokens seen", lambda r, e: r.tokens_seen, lambda v: f"{v:,}", None),
    ("perplexity per token", lambda r, e: e.perplexity, lambda v: f"{v:.2f}", min),
    ("perplexity per word", lambda r, e: e.word_perplexity, lambda v: f"{v:,.1f}", min),
    ("perplexity per byte", lambda r, e: e.byte_perplexity, lambda v: f"{v:.4f}", min),
    ("bits per byte", lambda r, e: e.bits_per_byte, lambda v: f"{v:.4f}", min),
    ("accuracy", lambda r, e: e.accuracy, lambda v: f"{v:.2%}", max),
    ("training tokens/s", lambda r, e: r.tokens_per_second, lambda v: f"{v:,.0f}", max),
    ("of measured matmul rate", lambda r, e: r.utilisation, lambda v: f"{v:.0%}", max),
    ("peak memory", lambda r, e: r.peak_memory_bytes, memory, min),
    ("training time", lambda r, e: r.seconds, duration, min),
)


def results_table(results: Sequence[RunResult], split: str | None = None) -> Table:
    """Runs side by side, a column each; the best of each row in bold where the data are the same.

    Args:
        results: of the runs.
        split: which evaluation; the test split where there is one, else validation.
    """
    pairs = [
        (result, result.evaluation(split or "test") or result.evaluations[0]) for result in results
    ]
    comparable = len(pairs) > 1 and len({r.data["sha256"] for r, _ in pairs}) == 1
    table = Table(title=f"on the {pairs[0][1].split} split", title_justify="left")
    table.add_column("", no_wrap=True)
    for result, _ in pairs:
        table.add_column(escape(result.name), justify="right")
    for heading, value, show, best in ROWS:
        values = [value(result, evaluation) for result, evaluation in pairs]
        mark = best(values) if best is not None and comparable else None
        table.add_row(heading, *(f"[bold]{show(v)}[/]" if v == mark else show(v) for v in values))
    for name in ("best checkpoint", "average"):
        if any(len(result.candidates) > 1 for result, _ in pairs):
            table.add_row(f"perplexity, {name}", *(_of_candidate(r, name) for r, _ in pairs))
    return table


def _of_candidate(result: RunResult, name: str) -> str:
    """Perplexity of the best checkpoint or of the average; the chosen one is marked."""
    candidate = result.candidate(name)
    if candidate is None:
        return "-"
    mark = " (chosen)" if result.chosen == name else ""
    return f"{candidate.evaluation.perplexity:.2f}{mark}"


def mixing_table(layers: Sequence[LayerMixing], title: str) -> Table:
    """Weight and effective share of each branch by layer, and means over the layers that mix it."""
    table = Table(title=title)
    table.add_column("layer", justify="right")
    weights, effective = [each.weights for each in layers], [each.effective for each in layers]
    names = branch_names(weights)
    for name in names:
        table.add_column(name, justify="right")
    for i, (w, e) in enumerate(zip(weights, effective, strict=True)):
        table.add_row(str(i), *(_share(w.get(n), e.get(n)) for n in names))
    table.add_section()
    means = ((mean_share(weights, n), mean_share(effective, n)) for n in names)
    table.add_row("mean", *(_share(w, e) for w, e in means))
    return table


def _share(weight: float | None, effective: float | None) -> str:
    if weight is None or effective is None:
        return "-"
    return f"{weight:.1%} ({effective:.1%})"


def mixing_history_table(records: Sequence[MixingRecord]) -> Table:
    """Mean weight over the layers that mix a branch with others, at every recorded step."""
    table = Table(title="mean weight over the layers, by step")
    names = branch_names([layer.weights for layer in records[0].layers])
    table.add_column("step", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for record in records:
        weights = [layer.weights for layer in record.layers]
        means = (mean_share(weights, n) for n in names)
        table.add_row(f"{record.step:,}", *("-" if m is None else f"{m:.2%}" for m in means))
    return table
