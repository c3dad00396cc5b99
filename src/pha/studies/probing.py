"""Probes of a study: what each finished run makes of long contexts, kept beside the run."""

from __future__ import annotations

from dataclasses import asdict

import torch
from rich.console import Console

from pha.data import TokenStore
from pha.evals.probes import PROBES, Question, Reading
from pha.evals.probes.reading import Readings
from pha.loading import load_model
from pha.results import JSON_FORMAT
from pha.runs import RunFolder
from pha.studies.jobs import Job
from pha.studies.outcome import Outcome
from pha.train.data import TextData
from pha.train.recipes import load_recipe
from pha.train.session import open_data
from pha.utils.files import sha256_file, write_json
from pha.utils.formats import read_json
from pha.utils.hardware import default_device, provenance
from pha.utils.progress import ProgressLine
from pha.utils.records import record_from


def probe_runs(outcome: Outcome, name: str, console: Console) -> Readings:
    """Ask every run of a study; what is kept beside a run as `probe-NAME.json` is not asked again.

    Returns:
        Label of a variant -> a reading for each seed, the baseline first. Variants of which a run
        diverged are left out.

    Raises:
        PHAError: too little text for the probe, or a file that is damaged.
    """
    plan, device, length = outcome.plan, default_device(), outcome.plan.study.probe_length
    rows = [row for row in outcome.rows if not row.diverged]
    rows.sort(key=lambda row: row.variant.name != plan.study.baseline)
    stores: dict[str, TokenStore] = {}
    found: dict[str, list[Reading]] = {row.variant.label: [] for row in rows}
    total, done = sum(len(row.seeds) for row in rows), 0
    with ProgressLine(console) as line:
        for row in rows:
            for job in plan.runs[row.variant.name]:
                where = f"{row.variant.label}, run {done + 1} of {total}"
                line.show(f"probe {name}", where, done / total)
                reading = _read_or_ask(job, name, length, stores, device, console)
                found[row.variant.label].append(reading)
                done += 1
        line.show(f"probe {name}", f"{total} runs", 1.0, is_last=True)
    return found


def _read_or_ask(
    job: Job,
    name: str,
    length: int | None,
    stores: dict[str, TokenStore],
    device: torch.device,
    console: Console,
) -> Reading:
    run = RunFolder(job.out)
    kept = job.out / f"probe-{name}.json"
    asked = {"result_sha256": sha256_file(run.result), "length": length}
    if kept.is_file():
        content = read_json(kept)
        if isinstance(content, dict) and {k: content.get(k) for k in asked} == asked:
            return record_from(Reading, content.get("reading"), str(kept))
    result = run.read_result()
    config = load_recipe(job.recipe, job.settings)
    data = str(result.data["sha256"])
    if data not in stores:
        opened = open_data(config, console)
        assert isinstance(opened, TextData)  # no plan has probes of a task
        stores[data] = opened.store
    scores, loaded = result.evaluations[0], load_model(job.out, device)
    question = Question(
        stores[data],
        scores.split,
        config.data.sequence_length,
        length=length,
        precision=scores.protocol["precision"],
        longest=getattr(loaded.model, "longest", None),
    )
    reading = PROBES[name](loaded, question, None)
    facts = asked | {
        "format": JSON_FORMAT,
        "provenance": provenance(device, question.precision),
    }
    write_json(kept, {"reading": asdict(reading)} | facts)
    return reading
