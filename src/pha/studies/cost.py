"""What a set of runs will cost, before any of it is paid for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pha.studies.jobs import Job
from pha.train.recipes import load_recipe
from pha.train.session import open_session
from pha.utils.text import count, duration


def estimate(jobs: Sequence[Job], console: Console) -> dict[str, Any]:
    """Tokens, work and time of every run that is not finished, as a table and a mapping.

    Raises:
        PHAError: a run that could not be started.
    """
    table = Table(title="runs to train", title_justify="left")
    table.add_column("run")
    for heading in ("parameters", "steps", "tokens", "FLOP", "about"):
        table.add_column(heading, justify="right")
    rows: list[dict[str, Any]] = []
    quiet = Console(file=io.StringIO())
    for job in jobs:
        if job.finished():
            continue
        plan = open_session(load_recipe(job.recipe, list(job.overrides)), job.out, quiet).plan
        rows.append({"run": str(job.out), **plan.to_dict()})
        table.add_row(
            str(job.out),
            count(plan.parameters),
            f"{plan.steps:,}",
            count(plan.tokens),
            count(plan.flops),
            duration(plan.seconds),
        )
    total = {key: sum(row[key] for row in rows) for key in ("tokens", "flops", "seconds")}
    table.add_section()
    table.add_row(
        f"{len(rows)} of {len(jobs)}, the rest is there",
        "",
        "",
        count(total["tokens"]),
        count(total["flops"]),
        duration(total["seconds"]),
    )
    console.print(table)
    return {"runs": rows, "total": total}
