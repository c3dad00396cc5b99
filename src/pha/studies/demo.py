"""`pha demo`: PHA and its attention-only twin at equal parameters and equal tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from pha.report import write_report
from pha.report.tables import mixing_table, results_table
from pha.utils.errors import PHAError, TrainingInterruptedError
from pha.utils.runs import RunFolder

TWINS = ("pha-tiny", "attention-only-tiny")
PROTOCOL = "stdlib"


def run_demo(out: Path, console: Console, steps: int | None = None) -> list[dict[str, Any]]:
    """Train both twins, each in a process of its own, and show what came of it.

    A process each makes peak memory a figure of one model. Whatever is finished is reused.

    Args:
        out: folder of the two runs and of report.html.
        console: for the tables.
        steps: optimiser steps per model; the recipe's when absent.

    Returns:
        The two results.

    Raises:
        PHAError: a training failed; its own message has been printed.
        TrainingInterruptedError: stopped by the user, resumable.
    """
    results = []
    for preset in TWINS:
        run = RunFolder(out / preset)
        console.rule(f"[bold]{preset}")
        _train(f"{preset}.{PROTOCOL}", run, steps)
        results.append(run.read_result())
    console.rule("[bold]results")
    console.print(results_table(results))
    for result in results:
        if any(len(layer["weights"]) > 1 for layer in result["mixing"]):
            title = f"mixing of {result['name']}: weight (effective share)"
            console.print(mixing_table(result["mixing"], title))
    for result in results:
        sample = result["samples"][0]
        text = f"[dim]{escape(sample['prompt'])}[/dim]{escape(sample['text'])}"
        console.print(Panel(text, title=f"{result['name']} continues", title_align="left"))
    title = "PHA and its attention-only twin"
    report = write_report([out / preset for preset in TWINS], out / "report.html", title=title)
    console.print(f"report: {report}", highlight=False)
    return results


def _train(recipe: str, run: RunFolder, steps: int | None) -> None:
    command = [sys.executable, "-m", "pha", "train", recipe, "--out", str(run.path), "--quiet"]
    if steps is not None:
        command += ["--run.steps", str(steps)]
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal sends Ctrl-C to both; the child is writing its checkpoint.
        code = process.wait()
    if code == 130:
        raise TrainingInterruptedError("stopped; the same command continues")
    if code != 0:
        raise PHAError(f"training {recipe} failed with exit code {code}; see above")
