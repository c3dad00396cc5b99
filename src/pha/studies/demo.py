"""`pha demo`: PHA, PHA+ and their attention-only twin at equal parameters and equal tokens."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pha.report.page import write_report
from pha.report.tables import mixing_table, results_table
from pha.results import RunResult
from pha.studies.jobs import Job, run_jobs
from pha.utils.outputs import require_file

MODELS = ("pha-tiny", "pha-plus-tiny", "attention-only-tiny")
PROTOCOL = "stdlib"


def run_demo(
    out: Path, progress: Console, console: Console, steps: int | None = None
) -> list[RunResult]:
    """Train all three, each in a process of its own, and show what came of it.

    A process each makes peak memory a figure of one model. Whatever is finished is reused. Without
    `steps` the recipe's are taken.

    Raises:
        PHAError: a training failed; its own message has been printed.
        TrainingInterruptedError: stopped by the user, resumable.
    """
    length = {} if steps is None else {"run.steps": steps}
    require_file(out / "report.html")
    jobs = [Job(f"{preset}.{PROTOCOL}", out / preset, length) for preset in MODELS]
    run_jobs(jobs, progress)
    results = [job.run.read_result() for job in jobs]
    console.rule(Text("results", style="bold"))
    console.print(results_table(results))
    for result in results:
        if any(len(layer.weights) > 1 for layer in result.mixing):
            title = f"mixing of {result.name}: weight (effective share)"
            console.print(mixing_table(result.mixing, title))
    for result in results:
        sample = result.samples[0]
        text = Text.assemble((sample.prompt, "dim"), sample.text)
        console.print(Panel(text, title=Text(f"{result.name} continues"), title_align="left"))
    folders, title = [job.out for job in jobs], "PHA, PHA+ and attention alone"
    report = write_report(folders, out / "report.html", title=title)
    console.print(f"report: {report}", highlight=False)
    return results
