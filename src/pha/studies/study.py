"""`pha study`: train what is missing, and write the table, the plots and the record of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pha.report.tables import TextTable
from pha.studies import efficiency, shares
from pha.studies.cluster import run_on_cluster
from pha.studies.definition import Scale, Study
from pha.studies.drawing import draw
from pha.studies.jobs import run_jobs
from pha.studies.outcome import Outcome, make_outcome
from pha.studies.planning import StudyPlan
from pha.studies.published import find_published
from pha.studies.tabulate import study_table
from pha.utils.files import write_json, write_text
from pha.utils.hardware import default_device, provenance


def run_study(
    plan: StudyPlan,
    folder: Path,
    console: Console,
    parallel: int = 1,
    partition: str | None = None,
) -> dict[str, Any]:
    """Run a study that trains, and write its files.

    Args:
        plan: the study.
        folder: for `study.json`, `table.*` and the plots; the runs lie where the plan says.
        console: for progress, the table and the sentences.
        parallel: runs side by side.
        partition: of a Slurm cluster to run on instead; needs submitit.

    Returns:
        The content of `study.json`.

    Raises:
        PHAError: a bad configuration, or a training that failed.
        TrainingInterruptedError: stopped by the user; the same call continues.
    """
    jobs = plan.jobs()
    if partition is not None:
        found = run_on_cluster(jobs, partition, folder, console)
    else:
        found = run_jobs(jobs, console, parallel)
    outcome = make_outcome(plan, {job.out: each for job, each in zip(jobs, found, strict=True)})
    tables, sentences = [study_table(outcome)], list(outcome.sentences)
    content = record(outcome)
    if plan.study.kind == "mixing":
        analysis = shares.analyse(outcome)
        tables.append(analysis.table)
        sentences += analysis.sentences
        content["mixing"] = analysis.record
    content["sentences"] = sentences
    write_json(folder / "study.json", content)
    write_tables(tables, sentences, folder)
    pictures = draw(outcome, folder)
    tell(plan.study, tables, sentences, console)
    console.print(f"files: {folder}, with {len(pictures)} pictures", highlight=False)
    return content


def run_efficiency(study: Study, scale: Scale, folder: Path, console: Console) -> dict[str, Any]:
    """Measure a study of speed and memory, and write its files after every measurement.

    Raises:
        PHAError: a preset or length that cannot be measured.
    """
    for measured in efficiency.measure(study, scale, folder, console):
        write_json(folder / "study.json", measured.record)
        write_tables(measured.tables, measured.sentences, folder)
        pictures = efficiency.draw(study, scale, measured, folder)
    tell(study, measured.tables, measured.sentences, console)
    console.print(f"files: {folder}, with {len(pictures)} pictures", highlight=False)
    return measured.record


def record(outcome: Outcome) -> dict[str, Any]:
    """Everything that was measured, with where it comes from, for JSON."""
    plan = outcome.plan
    return {
        "kind": "study",
        "study": plan.study.name,
        "title": plan.study.title,
        "paper": plan.study.paper,
        "question": plan.study.question,
        "scale": {"name": plan.scale.name, "about": plan.scale.about},
        "seeds": list(plan.seeds),
        "variants": [
            {
                "name": row.variant.name,
                "label": row.variant.label,
                "model": row.variant.model,
                "places": row.variant.places,
                "published": list(row.variant.published),
                "settings": list(plan.of(row.variant)[0].job.overrides[:-1]),
                "recipe": plan.of(row.variant)[0].job.recipe,
                "diverged": row.diverged,
                "measures": {name: each.to_dict() for name, each in row.summaries.items()},
                "seeds": [
                    {
                        "seed": seed.seed,
                        "run": str(seed.folder),
                        "status": "diverged" if seed.diverged_at is not None else "finished",
                        "diverged_at": seed.diverged_at,
                        "measures": seed.measures,
                        **seed.brief,
                    }
                    for seed in row.seeds
                ],
            }
            for row in outcome.rows
        ],
        "differences": [each.to_dict() for each in outcome.differences],
        "published": [vars(row) for row in find_published(plan.study.published)],
        "summarised": provenance(default_device(), "-"),
    }


def write_tables(tables: Sequence[TextTable], sentences: Sequence[str], folder: Path) -> None:
    """`table.md` (with the sentences), `table.tex`, and a CSV for each table."""
    said = "".join(f"- {sentence}\n" for sentence in sentences)
    markdown = "\n".join(table.to_markdown() for table in tables)
    write_text(folder / "table.md", markdown + (f"\n{said}" if said else ""))
    write_text(folder / "table.tex", "\n".join(table.to_latex() for table in tables))
    for number, table in enumerate(tables, start=1):
        name = "table.csv" if number == 1 else f"table-{number}.csv"
        write_text(folder / name, table.to_csv())


def tell(
    study: Study, tables: Sequence[TextTable], sentences: Sequence[str], console: Console
) -> None:
    """Print tables and sentences."""
    console.print(study.question, highlight=False, markup=False)
    for table in tables:
        console.print(table)
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False, markup=False)
