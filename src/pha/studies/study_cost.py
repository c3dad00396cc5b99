"""What a study will cost, worked out without touching anything."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pha.data import TokenStore
from pha.studies.jobs import Job
from pha.studies.planning import StudyPlan
from pha.train.config import TrainConfig
from pha.train.plan import ASSUMED_UTILISATION, Plan, make_plan
from pha.train.recipes import load_recipe
from pha.utils.hardware import choose_precision, default_device
from pha.utils.text import count, duration

VOCABULARY = 50257  # of GPT-2, where the data are not there yet
UNBOUNDED = 1 << 40  # sequences, where the number of steps does not depend on the data


def study_cost(plan: StudyPlan, console: Console) -> dict[str, Any]:
    """Tokens, work and time of every run, as a table and a mapping.

    Time is at 40% of the measured rate of matrix products, or as in the runs that are finished.

    Raises:
        PHAError: a run that could not be started.
    """
    plans: dict[Path, Plan | None] = {}
    rows: list[dict[str, Any]] = []
    ratios = []
    for job in plan.jobs():
        if job.out.parent not in plans:
            plans[job.out.parent] = _plan(job, plan)
        one = plans[job.out.parent]
        finished = job.finished()
        if one is not None and finished and job.run.result.is_file():
            ratios.append(job.run.read_result().seconds / one.seconds)
        sizes = {} if one is None else one.to_dict()
        rows.append({"run": str(job.out), "recipe": job.recipe, "finished": finished, **sizes})
    ratio = statistics.median(ratios) if ratios else 1.0
    for row in rows:
        if "seconds" in row:
            row["seconds"] *= ratio
    left = [row for row in rows if not row["finished"] and "tokens" in row]
    total = {key: sum(row[key] for row in left) for key in ("tokens", "flops", "seconds")}
    basis = (
        f"training alone, as measured in {len(ratios)} finished runs"
        if ratios
        else f"training alone, at {ASSUMED_UTILISATION:.0%} of the measured matmul rate"
    )
    _print(plan, rows, total, basis, console)
    return {"runs": rows, "total": total, "basis": basis}


def _plan(job: Job, plan: StudyPlan) -> Plan | None:
    """The sizes of a run; None where they depend on data that are not there."""
    config = load_recipe(job.recipe, list(job.overrides))
    length = config.data.sequence_length
    if config.data.store is not None:
        store = TokenStore.open(Path(config.data.store))
        windows, vocabulary = (len(store.tokens("train")) - 1) // length, store.vocab_size
    else:
        tokens = plan.scale.train_tokens.get(job.recipe.rpartition(".")[2])
        known = config.data.source == load_recipe(job.recipe).data.source and tokens is not None
        if not known and config.run.steps is None:
            return None
        windows = int(tokens) // length if known and tokens is not None else UNBOUNDED
        vocabulary = VOCABULARY
    device = default_device()
    precision = choose_precision(config.run.precision, device)
    sized: TrainConfig = replace(config, model=replace(config.model, vocab_size=vocabulary))
    return make_plan(sized, windows, device, precision, 1)


def _print(
    plan: StudyPlan,
    rows: list[dict[str, Any]],
    total: dict[str, Any],
    basis: str,
    console: Console,
) -> None:
    table = Table(title=f"{plan.study.title}: runs", title_justify="left", caption=basis)
    table.add_column("variant")
    for heading in ("parameters", "steps", "tokens", "FLOP", "about", "seeds left"):
        table.add_column(heading, justify="right")
    by_run = {row["run"]: row for row in rows}
    for variant in plan.study.variants:
        own = [by_run[str(run.job.out)] for run in plan.of(variant)]
        left = sum(not row["finished"] for row in own)
        first = own[0]
        sizes = ["–"] * 5
        if "tokens" in first:
            sizes = [
                count(first["parameters"]),
                f"{first['steps']:,}",
                count(first["tokens"]),
                count(first["flops"]),
                duration(first["seconds"]),
            ]
        table.add_row(variant.label, *sizes, f"{left} of {len(own)}")
    left = sum(not row["finished"] for row in rows)
    table.add_section()
    table.add_row(
        f"{left} of {len(rows)} runs",
        *("", "", count(total["tokens"]), count(total["flops"]), duration(total["seconds"]), ""),
    )
    console.print(table)
