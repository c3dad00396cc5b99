"""`pha study`: train what is missing, and write the table, the plots and the record of a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pha.report.probes import probe_record, probe_tables, save_probe
from pha.report.tables import TextTable
from pha.results import JSON_FORMAT
from pha.studies import efficiency, laws, shares, tasks
from pha.studies.definition import Scale, Study
from pha.studies.drawing import draw
from pha.studies.jobs import Job, run_jobs, run_on_cluster
from pha.studies.measures import MEASURES
from pha.studies.outcome import Outcome, Seed, make_outcome
from pha.studies.planning import StudyPlan, settle
from pha.studies.probing import probe_runs
from pha.studies.published import find_published
from pha.studies.tabulate import study_table
from pha.studies.times import Times
from pha.utils.files import remove_leftovers, write_json, write_text
from pha.utils.hardware import default_device, provenance
from pha.utils.outputs import hold, require_outputs, writing

# Of a run's result, for the record of the study.
BRIEF = (
    *("steps", "tokens_seen", "seconds", "tokens_per_second", "chosen", "peak_memory_bytes"),
    *("data", "provenance"),
)

ANALYSES = {"mixing": shares.analyse, "tasks": tasks.analyse, "laws": laws.analyse}
"""Kind of a study -> what it adds: a table, sentences, and a record under the kind's name."""


@dataclass(frozen=True)
class Files:
    """The folder of a study: `study.json`, `table.*`, and what is said of them on the terminal."""

    study: Study
    scale: Scale
    folder: Path
    shown: Console  # for the outcome

    def write(
        self, tables: Sequence[TextTable], sentences: Sequence[str], content: dict[str, Any]
    ) -> dict[str, Any]:
        """Write `study.json` (returned), `table.md`, `table.tex`, and a CSV for each table."""
        content = {
            "kind": "study",
            "format": JSON_FORMAT,
            "study": self.study.name,
            "title": self.study.title,
            "paper": self.study.paper,
            "question": self.study.question,
            "scale": {"name": self.scale.name, "about": self.scale.about},
            **content,
            "published": [vars(row) for row in find_published(self.study.published)],
            "sentences": list(sentences),
            "summarised": provenance(default_device(), "-"),
        }
        said = "".join(f"- {sentence}\n" for sentence in sentences)
        markdown = "\n".join(table.to_markdown() for table in tables)
        with writing(self.folder):
            write_json(self.folder / "study.json", content)
            write_text(self.folder / "table.md", markdown + (f"\n{said}" if said else ""))
            write_text(self.folder / "table.tex", "\n".join(table.to_latex() for table in tables))
            for number, table in enumerate(tables, start=1):
                name = "table.csv" if number == 1 else f"table-{number}.csv"
                write_text(self.folder / name, table.to_csv())
        return content

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Hold the folder meanwhile.

        Raises:
            PHAError: it cannot be written, holds files of others, or is in use.
        """
        require_outputs(self.folder, "study.json", "table.md", "table.tex", "table.csv")
        refusal = f"{self.folder} is in use by another process; let it finish"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with hold(self.folder / ".lock", lambda: refusal) as is_held:
                remove_leftovers(self.folder, held=is_held)
                yield

    def tell(
        self, tables: Sequence[TextTable], sentences: Sequence[str], pictures: Sequence[Path]
    ) -> None:
        """Print tables and sentences, and where the files are."""
        show = self.shown.print
        show(self.study.question, highlight=False, markup=False)
        for table in tables:
            show(table)
        for sentence in sentences:
            show(f"- {sentence}", highlight=False, markup=False)
        show(f"files: {self.folder}, with {len(pictures)} pictures", highlight=False)


def run_study(
    plan: StudyPlan,
    folder: Path,
    console: Console,
    parallel: int = 1,
    partition: str | None = None,
    *,
    times: Times | None = None,
    shown: Console | None = None,
) -> dict[str, Any]:
    """Run a study that trains; write `study.json` (returned), `table.*` and the plots to `folder`.

    The runs lie where the plan says, `parallel` of them side by side, or on the nodes of a Slurm
    partition, which needs submitit. `times` stand in the place of what the runs took. Progress
    goes to `console`, and the outcome to `shown` where that is another.

    Raises:
        PHAError: a bad configuration, or a training that failed.
        TrainingInterruptedError: stopped by the user; the same call continues.
    """
    files = Files(plan.study, plan.scale, folder, shown or console)
    with files.kept():

        def train(jobs: Sequence[Job]) -> None:
            if partition is not None:
                run_on_cluster(jobs, partition, folder, console)
            else:
                run_jobs(jobs, console, parallel)

        if plan.trials is not None:
            train(plan.trials.jobs())
        plan, choices = settle(plan)
        train(plan.jobs())
        outcome = make_outcome(plan, times)
        tables, sentences, content = [study_table(outcome)], outcome.sentences(), record(outcome)
        if choices:
            content["tuning"] = list(map(asdict, choices))
            sentences += [choice.sentence() for choice in choices]
        kind = plan.study.kind
        if kind in ANALYSES:
            table, more, content[kind] = ANALYSES[kind](outcome)
            # Of a task there is nothing per word or byte, as the usual table has it.
            tables = [table] if kind == "tasks" else [*tables, table]
            sentences += more
        content = files.write(tables, sentences, content)
        pictures = draw(outcome, folder)
        for name in plan.study.probes:
            if readings := probe_runs(outcome, name, console):
                tables += probe_tables(readings)
                content.setdefault("probes", {})[name] = probe_record(readings)
                content = files.write(tables, sentences, content)
                about = f"{plan.study.title}, {plan.scale.words}"
                pictures += save_probe(readings, folder / f"probe-{name}", about)
        files.tell(tables, sentences, pictures)
    return content


def run_efficiency(
    study: Study, scale: Scale, folder: Path, console: Console, shown: Console | None = None
) -> dict[str, Any]:
    """Measure a study of speed and memory, and write its files after every measurement.

    Raises:
        PHAError: a preset or length that cannot be measured.
    """
    files = Files(study, scale, folder, shown or console)
    with files.kept():
        for measured in efficiency.measure(study, scale, folder, console):
            content = files.write(measured.tables, measured.sentences, measured.record)
            pictures = efficiency.draw(study, scale, measured, folder)
    files.tell(measured.tables, measured.sentences, pictures)
    return content


def record(outcome: Outcome) -> dict[str, Any]:
    """Everything that was measured, with where it comes from, for JSON."""
    plan = outcome.plan
    rows = []
    for row in outcome.rows:
        variant, job = row.variant, plan.runs[row.variant.name][0]
        summaries = {name: row.summary(name) for name in MEASURES}
        rows.append(
            {
                "name": variant.name,
                "label": variant.label,
                "model": variant.model,
                "places": variant.places,
                "published": list(variant.published),
                "settings": {k: v for k, v in job.settings.items() if k != "run.seed"},
                "recipe": job.recipe,
                "diverged": row.diverged,
                "measures": {name: asdict(s) for name, s in summaries.items() if s is not None},
                "seeds": list(map(_seed_record, row.seeds)),
            }
        )
    return {
        "seeds": list(plan.seeds),
        "times": None
        if outcome.times is None
        else {"study": str(outcome.times.path), "hardware": outcome.times.hardware},
        "best": None if outcome.best is None else outcome.best.variant.name,
        "variants": rows,
        "differences": [asdict(each) for each in outcome.differences],
    }


def _seed_record(seed: Seed) -> dict[str, Any]:
    found: dict[str, Any] = {
        "seed": seed.seed,
        "run": str(seed.folder),
        "status": "finished" if seed.result is not None else "diverged",
        "diverged_at": seed.diverged_at,
        "measures": seed.measures,
    }
    if seed.result is not None:
        found |= {key: getattr(seed.result, key) for key in BRIEF}
        found["parameters"] = asdict(seed.result.model.parameters)
        found["protocol"] = seed.result.evaluations[0].protocol
    return found
