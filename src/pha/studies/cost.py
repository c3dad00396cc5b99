"""What a study will cost, worked out without touching anything."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pha.data import TokenStore
from pha.studies.jobs import Job
from pha.studies.planning import StudyPlan
from pha.tasks import make_task
from pha.train.data import UNBOUNDED
from pha.train.plan import ASSUMED_UTILISATION, Plan, make_plan
from pha.train.recipes import load_recipe
from pha.utils.hardware import choose_precision, default_device
from pha.utils.text import DASH, count, duration

VOCABULARY = 50257  # of GPT-2, where the data are not there yet


def study_cost(plan: StudyPlan, console: Console) -> dict[str, Any]:
    """Tokens, work and time of every run, as a table and a mapping.

    Raises:
        PHAError: a run that could not be started.
    """
    plans: dict[Path, Plan | None] = {}
    rows: dict[Path, dict[str, Any]] = {}
    trials = [] if plan.trials is None else plan.trials.jobs()
    for job in [*trials, *plan.jobs()]:
        home = job.out.parent
        if home not in plans:
            plans[home] = _plan(job, plan)
        one = plans[home]
        facts = {"run": str(job.out), "recipe": job.recipe, "finished": job.finished()}
        rows[job.out] = facts | ({} if one is None else asdict(one))
    left = [row for row in rows.values() if not row["finished"]]
    total = {key: sum(row.get(key, 0) for row in left) for key in ("tokens", "flops", "seconds")}
    basis = f"training alone, at {ASSUMED_UTILISATION:.0%} of the measured matmul rate"
    table = Table(title=f"{plan.study.title}: runs", title_justify="left", caption=basis)
    table.add_column("variant")
    for heading in ("parameters", "steps", "tokens", "FLOP", "about", "seeds left"):
        table.add_column(heading, justify="right")
    for variant in plan.study.variants:
        own = [rows[job.out] for job in plan.runs[variant.name]]
        seeds_left = sum(not row["finished"] for row in own)
        table.add_row(variant.label, *_cells(own[0]), f"{seeds_left} of {len(own)}")
    if trials:
        unfinished = sum(not rows[job.out]["finished"] for job in trials)
        table.add_row("trials", *_cells({}), f"{unfinished} of {len(trials)}")
    table.add_section()
    table.add_row(f"{len(left)} of {len(rows)} runs", *_cells(total), "")
    console.print(table)
    return {"runs": list(rows.values()), "total": total, "basis": basis}


def _plan(job: Job, plan: StudyPlan) -> Plan | None:
    """The sizes of a run; None where they depend on data that are not there."""
    config = load_recipe(job.recipe, job.settings)
    length = config.data.sequence_length
    if config.data.task is not None:
        task = make_task(config.data.task, config.data.task_options)
        windows, vocabulary = UNBOUNDED, len(task.words())
    elif config.data.store is not None:
        store = TokenStore.open(Path(config.data.store), verify=False)
        windows, vocabulary = (len(store.tokens("train")) - 1) // length, store.vocab_size
    else:
        tokens = None  # of a source of one's own
        if "data.source" not in job.settings:
            tokens = plan.scale.train_tokens.get(job.recipe.rpartition(".")[2])
        if tokens is None and config.run.steps is None:
            return None
        windows = UNBOUNDED if tokens is None else int(tokens) // length
        vocabulary = VOCABULARY
    device = default_device()
    precision = choose_precision(config.run.precision, device)
    sized = replace(config, model=replace(config.model, vocab_size=vocabulary))
    return make_plan(sized, windows, device, precision, 1)


def _cells(sizes: dict[str, Any]) -> list[str]:
    steps = sizes.get("steps")
    return [
        count(sizes.get("parameters")),
        DASH if steps is None else f"{steps:,}",
        count(sizes.get("tokens")),
        count(sizes.get("flops")),
        duration(sizes.get("seconds")),
    ]
