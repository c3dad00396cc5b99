"""What the runs of a study come to: figures by variant, differences, sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pha.report.collect import Run, collect
from pha.results import RunResult
from pha.studies.definition import Variant
from pha.studies.measures import MEASURES, measure_all, summarise_all
from pha.studies.paired import Difference, adjust, paired_difference, sentence
from pha.studies.planning import StudyPlan
from pha.studies.statistics import Summary
from pha.utils.text import DASH, count

MAIN = "test"


@dataclass(frozen=True)
class Seed:
    """One run of a variant.

    Attributes:
        seed: of weights and data order.
        folder: of the run.
        measures: name -> value; empty where the run diverged.
        diverged_at: the step, if it did.
        brief: tokens seen, seconds and the like, for the record.
    """

    seed: int
    folder: Path
    measures: dict[str, float]
    diverged_at: int | None
    brief: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A variant with its seeds."""

    variant: Variant
    seeds: tuple[Seed, ...]
    summaries: dict[str, Summary]

    @property
    def diverged(self) -> int:
        """How many runs did."""
        return sum(seed.diverged_at is not None for seed in self.seeds)

    def values(self, measure: str) -> dict[int, float]:
        """Seed -> value, of the runs that have it."""
        return {s.seed: s.measures[measure] for s in self.seeds if measure in s.measures}

    def runs(self) -> list[Run]:
        """The finished runs, with their histories."""
        return [collect([seed.folder])[0] for seed in self.seeds if seed.measures]


@dataclass(frozen=True)
class Outcome:
    """A study that has been run.

    Attributes:
        plan: what was asked.
        rows: one for each variant.
        differences: of variants from the baseline, and of measures inside runs.
        sentences: what the data support.
        results: of all finished runs.
    """

    plan: StudyPlan
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    sentences: tuple[str, ...]
    results: tuple[RunResult, ...]

    @property
    def tokens(self) -> str:
        """Tokens seen by a run, in words; a range where they differ."""
        seen = sorted({result.tokens_seen for result in self.results})
        if not seen:
            return "no"
        return count(seen[0]) if len(seen) == 1 else f"{count(seen[0])} to {count(seen[-1])}"


def make_outcome(plan: StudyPlan, outcomes: dict[Path, dict[str, Any]]) -> Outcome:
    """Gather the runs of a plan.

    Args:
        plan: the study.
        outcomes: run folder -> what `Job.outcome` says of it.
    """
    rows = []
    results: dict[Path, RunResult] = {}
    for variant in plan.study.variants:
        seeds = []
        for run in plan.of(variant):
            outcome = outcomes[run.job.out]
            result = outcome.get("result")
            if result is not None:
                results[run.job.out] = result
            seeds.append(
                Seed(
                    run.seed,
                    run.job.out,
                    {} if result is None else measure_all(result),
                    outcome.get("step"),
                    {} if result is None else _brief(result),
                )
            )
        found = [seed.measures for seed in seeds if seed.measures]
        rows.append(Row(variant, tuple(seeds), summarise_all(found)))
    differences = _differences(plan, rows)
    sentences = [*_divergences(rows), *_sentences(plan, differences, list(results.values()))]
    return Outcome(plan, tuple(rows), tuple(differences), tuple(sentences), tuple(results.values()))


def _brief(result: RunResult) -> dict[str, Any]:
    keys = ("steps", "tokens_seen", "seconds", "tokens_per_second", "chosen", "peak_memory_bytes")
    return {key: getattr(result, key) for key in keys} | {
        "parameters": asdict(result.model.parameters),
        "protocol": result.evaluations[0].protocol,
        "data": result.data,
        "provenance": result.provenance,
    }


def _differences(plan: StudyPlan, rows: Sequence[Row]) -> list[Difference]:
    study = plan.study
    by_name = {row.variant.name: row for row in rows}
    base = by_name.get(study.baseline)
    found = []
    if base is not None:
        for row in rows:
            if row is not base:
                pair = (row.variant.name, base.variant.name)
                found.append(paired_difference(*pair, MAIN, row.values(MAIN), base.values(MAIN)))
    between = adjust([each for each in found if each is not None])
    inside = []
    for a, b in study.contrasts:
        for row in rows:
            name = f"{row.variant.name}:"
            each = paired_difference(name + a, name + b, MAIN, row.values(a), row.values(b))
            inside += [] if each is None else [each]
    return [*between, *adjust(inside)]


def _divergences(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.variant.label} diverged in {row.diverged} of {len(row.seeds)} runs."
        for row in rows
        if row.diverged
    ]


def _sentences(
    plan: StudyPlan, differences: Sequence[Difference], results: Sequence[RunResult]
) -> list[str]:
    labels = {variant.name: variant.label for variant in plan.study.variants}
    for variant in plan.study.variants:
        for name, measure in MEASURES.items():
            labels[f"{variant.name}:{name}"] = f"{variant.label} ({measure.heading.split(',')[0]})"
    tokens = {result.tokens_seen for result in results}
    data = {result.data["sha256"] for result in results}
    equal = f"at equal tokens ({count(min(tokens))})" if len(tokens) == len(data) == 1 else ""
    words, digits = MEASURES[MAIN].words, MEASURES[MAIN].digits
    return [sentence(each, labels, words, digits, equal) for each in differences]


def show(row: Row, measure: str) -> str:
    """A cell of the table."""
    return MEASURES[measure].show(row.summaries.get(measure)) if row.summaries else DASH
