"""What the runs of a study come to: figures by variant, differences, sentences."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pha.results import Metrics, RunResult
from pha.runs import RunFolder
from pha.studies.definition import Variant
from pha.studies.jobs import Job
from pha.studies.measures import MEASURES, measure_all
from pha.studies.planning import StudyPlan
from pha.studies.seeds import (
    Difference,
    Summary,
    adjust,
    paired_difference,
    summarise,
)
from pha.studies.times import Times
from pha.utils.text import count

MAIN = "test"
_TIMES = {"speed", "seconds"}


@dataclass(frozen=True)
class Seed:
    """One run of a variant."""

    seed: int  # of weights and data order
    folder: Path  # of the run
    result: RunResult | None  # None where it diverged
    measures: dict[str, float]  # name -> value; empty where it diverged
    diverged_at: int | None  # the step, if it did

    @classmethod
    def of(cls, seed: int, job: Job) -> Seed:
        """Read a run that has ended."""
        result = job.result()
        measures = {} if result is None else measure_all(result)
        return cls(seed, job.out, result, measures, job.diverged_at())


@dataclass(frozen=True)
class Row:
    """A variant with its seeds."""

    variant: Variant
    seeds: Sequence[Seed]

    @property
    def diverged(self) -> int:
        """How many runs did."""
        return sum(seed.result is None for seed in self.seeds)

    def values(self, measure: str) -> dict[int, float]:
        """Seed -> value, of the runs that have it."""
        return {s.seed: s.measures[measure] for s in self.seeds if measure in s.measures}

    def without(self, measures: Collection[str]) -> Row:
        """The same without these."""
        kept = [
            replace(s, measures={k: v for k, v in s.measures.items() if k not in measures})
            for s in self.seeds
        ]
        return replace(self, seeds=kept)

    def timed(self, times: Times) -> Row:
        """The same with the times of another study."""
        kept = [
            seed
            if seed.result is None
            else replace(
                seed,
                measures=seed.measures | times.of(self.variant.name, seed.result.tokens_seen),
            )
            for seed in self.seeds
        ]
        return replace(self, seeds=kept)

    def summary(self, measure: str) -> Summary | None:
        """Over all runs that did not diverge; None unless each has it."""
        values = list(self.values(measure).values())
        return (
            summarise(values) if values and len(values) + self.diverged == len(self.seeds) else None
        )

    def histories(self) -> list[Metrics]:
        """Of the runs that did not diverge."""
        folders = [RunFolder(seed.folder) for seed in self.seeds if seed.result is not None]
        return [folder.read_metrics() for folder in folders]


@dataclass(frozen=True)
class Outcome:
    """A study that has been run."""

    plan: StudyPlan  # what was asked
    rows: Sequence[Row]  # one for each variant
    differences: Sequence[Difference]  # of variants from the baseline, and of measures inside runs
    times: Times | None = None  # where they are another study's

    @property
    def results(self) -> list[RunResult]:
        """Of all finished runs."""
        return [s.result for row in self.rows for s in row.seeds if s.result is not None]

    @property
    def hardware(self) -> list[str]:
        """Of its runs, each once."""
        return list(dict.fromkeys(result.hardware for result in self.results))

    @property
    def tokens(self) -> str:
        """Tokens seen by a run, in words; a range where they differ."""
        seen = sorted({result.tokens_seen for result in self.results})
        if not seen:
            return "no"
        return count(seen[0]) if len(seen) == 1 else f"{count(seen[0])} to {count(seen[-1])}"

    @property
    def best(self) -> Row | None:
        """The variant of the lowest mean validation perplexity, of those that never diverged."""
        means = {
            summary.mean: row
            for row in self.rows
            if not row.diverged and (summary := row.summary("validation")) is not None
        }
        return means[min(means)] if means else None

    def sentences(self) -> list[str]:
        """What the data support."""
        study = self.plan.study
        said = [
            f"{row.variant.label} diverged in {row.diverged} of {len(row.seeds)} runs."
            for row in self.rows
            if row.diverged
        ]
        if study.axis and self.best is not None:
            said.append(f"The lowest validation perplexity is that of {self.best.variant.label}.")
        labels = {variant.name: variant.label for variant in study.variants}
        for variant in study.variants:
            for name, measure in MEASURES.items():
                short = measure.heading.split(",")[0]
                labels[f"{variant.name}:{name}"] = f"{variant.label} ({short})"
        tokens = {result.tokens_seen for result in self.results}
        data = {result.data["sha256"] for result in self.results}
        equal = f"at equal tokens ({count(min(tokens))})" if len(tokens) == len(data) == 1 else ""
        words, digits = MEASURES[MAIN].words, MEASURES[MAIN].digits
        said += [each.sentence(labels, words, digits, equal) for each in self.differences]
        if self.times is not None:
            said.append(f"Times are by the speeds in {self.times.path}, of {self.times.hardware}.")
        elif len(self.hardware) > 1 and _TIMES & {*study.columns}:
            said.append(f"Times do not compare, as runs are of {' and of '.join(self.hardware)}.")
        return said


def make_outcome(plan: StudyPlan, times: Times | None = None) -> Outcome:
    """Read the runs of a plan, all of which have ended."""
    rows = [
        Row(variant, list(map(Seed.of, plan.seeds, plan.runs[variant.name])))
        for variant in plan.study.variants
    ]
    between, inside = [], []
    for base in rows:
        if base.variant.name == plan.study.baseline:
            between = [_difference(row, MAIN, base, MAIN) for row in rows if row is not base]
    for a, b in plan.study.contrasts:
        inside += [_difference(row, a, row, b) for row in rows]
    found = [adjust([each for each in group if each is not None]) for group in (between, inside)]
    outcome = Outcome(plan, rows, [each for group in found for each in group], times)
    if times is not None:
        outcome = replace(outcome, rows=[row.timed(times) for row in rows])
    elif len(outcome.hardware) > 1:
        outcome = replace(outcome, rows=[row.without(_TIMES) for row in rows])
    return outcome


def _difference(a: Row, measure_a: str, b: Row, measure_b: str) -> Difference | None:
    inside = a is b
    return paired_difference(
        f"{a.variant.name}:{measure_a}" if inside else a.variant.name,
        f"{b.variant.name}:{measure_b}" if inside else b.variant.name,
        MAIN,
        a.values(measure_a),
        b.values(measure_b),
    )
