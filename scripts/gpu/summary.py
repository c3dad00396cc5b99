"""The page that is read first: what was done, what failed, and every figure in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def summarise(record: dict[str, Any]) -> Iterator[str]:
    """The lines of summary.md, from `pha`'s own records."""
    facts = (record["environment"] or {}).get("environment", {})
    yield "# A run of scripts/gpu.sh"
    yield ""
    for name in ("device", "cpu", "torch", "triton", "transformers", "python", "commit"):
        value = facts.get(name) or (record["commit"] if name == "commit" else None)
        yield f"- {name}: {value or 'not known'}"
    for name in ("matmul fp32", "matmul bf16", "free memory"):
        if name in facts:
            yield f"- {name}: {facts[name]}"
    for name, loss in record["missing_packages"].items():
        yield f"- missing: {name} ({loss})"
    yield from _steps(record)
    yield from _backends((record["environment"] or {}).get("backends", []))
    rows = [row for rows in record["benchmarks"].values() for row in rows]
    for mode in ("scan", "gated-scan", "loss", "attention", "documents"):
        yield from _ops(mode, [row for row in rows if row["mode"] == mode])
    for mode in ("train", "prefill", "decode"):
        yield from _models(mode, [row for row in rows if row["mode"] == mode])
    yield from _runs(record["runs"])


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        return
    yield from ("", f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head))
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |"


def _steps(record: dict[str, Any]) -> Iterator[str]:
    rows = [
        (step["stage"], step["name"], step["status"], f"{step['seconds']:.0f}", step["reason"])
        for step in record["steps"]
    ]
    yield from _table("Steps", ("stage", "step", "status", "seconds", "why"), rows)
    if record["tests"] is not None:
        counts = record["tests"]
        passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
        rest = ", ".join(f"{n} {name}" for name, n in counts.items() if name != "tests")
        yield from ("", f"Tests marked `gpu`: {passed} passed, {rest}.")


def _backends(backends: Sequence[Row]) -> Iterator[str]:
    rows = [
        (
            f"{check['op']} on {check['device']}",
            check["backend"] + " (used)" * check["used"],
            {True: "ok", False: "WRONG", None: ""}[check["ok"]],
            check["reason"] if check["error"] is None else f"{check['error']:.1e}",
        )
        for check in backends
    ]
    yield from _table(
        "Backends against their oracle", ("op", "backend", "", "error, or why there is none"), rows
    )


def _ops(mode: str, rows: Sequence[Row]) -> Iterator[str]:
    yield from _table(
        f"Kernels: {mode}",
        ("shape", "precision", "backend", "tok/s", "of floor", "GB"),
        [
            (
                f"{row['batch']} x {row['length']}",
                row["precision"],
                row["backend"],
                *_measured(row, "of_floor"),
            )
            for row in rows
        ],
    )


def _models(mode: str, rows: Sequence[Row]) -> Iterator[str]:
    yield from _table(
        mode.capitalize(),
        ("shape", "precision", "model", "tok/s", "of matmul", "GB"),
        [
            (
                f"{row['batch']} x {row['length']}",
                row["precision"],
                row["model"] + " compiled" * row["compiled"],
                *_measured(row, "utilisation"),
            )
            for row in rows
        ],
    )


def _measured(row: Row, share: str) -> tuple[str, str, str]:
    if row["error"] is not None:
        return row["error"][:80], "-", "-"
    speed, memory = row["tokens_per_second"]["median"], row["peak_memory"]
    return f"{speed:,.0f}", f"{row[share]:.0%}", f"{memory / 1e9:.2f}"


def _runs(runs: dict[str, Any]) -> Iterator[str]:
    head = (
        *("run", "parameters", "tokens", "tok/s", "of matmul", "waiting for data"),
        *("validation ppl", "test ppl"),
    )
    rows = [
        (
            name,
            f"{result['model']['parameters']['total']:,}",
            f"{result['tokens_seen']:,}",
            f"{result['tokens_per_second']:,.0f}",
            f"{result['utilisation']:.0%}",
            f"{result['data_wait']:.2%}",
            f"{result['best_validation_perplexity']:.2f}",
            f"{result['evaluations'][0]['perplexity']:.2f}",
        )
        for name, result in runs.items()
    ]
    yield from _table("Training runs", head, rows)
