"""Runs on tasks: how many seeds solve the task, how soon, and how accurate they are by test.

Accuracy on a task jumps from chance to nearly one, sooner or later or never. So seeds are counted
and ordered, not averaged: the share that solve it with its binomial interval, medians and ranges.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pha.report.charts import Fan
from pha.report.tables import Section, TextTable
from pha.results import SOLVED, Evaluation, Part, RunResult
from pha.studies.outcome import Outcome, Row
from pha.utils.text import DASH, count, fixed


def results_of(row: Row) -> list[RunResult]:
    """Of the seeds that did not diverge."""
    return [seed.result for seed in row.seeds if seed.result is not None]


def score_of(of: Evaluation | Part) -> float:
    """Nats above the best predictor where that is known, else accuracy in %."""
    return 100 * of.accuracy if of.best is None else of.loss - of.best


def score_label(outcome: Outcome) -> str:
    """What `score_of` gives, in words."""
    known = any(r.evaluations[0].best is not None for r in outcome.results)
    return "nats above the best predictor" if known else "accuracy, %"


def analyse(outcome: Outcome) -> tuple[TextTable, list[str], dict[str, Any]]:
    """The table, what the data support, and the record for JSON, variant by variant."""
    record = {row.variant.name: _record(row) for row in outcome.rows}
    labels = list(dict.fromkeys(label for each in record.values() for label in each["tests"]))
    rows, sentences = [], []
    for row in outcome.rows:
        each = record[row.variant.name]
        low, high = each["interval"]
        sizes = results_of(row)[:1]
        solved = (
            f"{each['solved']} of {each['of']} ({low:.0%} to {high:.0%})",
            _range(each["steps"]),
        )
        rows.append(
            [
                row.variant.label,
                count(sizes[0].model.parameters.total) if sizes else DASH,
                count(sizes[0].model.cache_bytes) if sizes else DASH,
                *((DASH, DASH) if each["excess"] else solved),
                *(fixed(each["tests"].get(label), 1 + 2 * each["excess"]) for label in labels),
            ]
        )
        if each["excess"]:
            test, above = next(iter(each["tests"].items()))
            sentences.append(
                f"{row.variant.label} is {above:.3f} nats above the best predictor on test {test}, "
                f"the median of {len(results_of(row))} seeds."
            )
        elif each["steps"]:
            sentences.append(
                f"{row.variant.label} solves it with {each['solved']} of {each['of']} seeds, after "
                f"{_range(each['steps'])} steps."
            )
        else:
            sentences.append(f"{row.variant.label} does not solve it with {each['of']} seeds.")
    headings = ["model", "parameters", "state, bytes", "solved", "steps to it"]
    about = f"{outcome.plan.scale.words}, {outcome.tokens} tokens seen"
    notes = [
        f"Solved: at least {SOLVED:.0%} of the first test's answers right, with the 95% interval "
        "of the share of seeds (Clopper and Pearson). Steps: median and range of those that solve "
        f"it, from the evaluations during training. Behind, by test: {score_label(outcome)}, the "
        "median over seeds."
    ]
    table = TextTable(
        outcome.plan.study.title, [*headings, *labels], [Section("ours", about, rows)], notes
    )
    return table, sentences, record


def _record(row: Row) -> dict[str, Any]:
    """Figures of a variant; a run that diverged has not solved anything."""
    from scipy.stats import binomtest

    results, seeds = results_of(row), len(row.seeds)
    solved = [r for r in results if r.evaluations[0].accuracy >= SOLVED]
    steps = [r.steps if r.solved_step is None else r.solved_step for r in solved]
    interval = binomtest(len(solved), seeds).proportion_ci()
    by_test: dict[str, list[float]] = {}
    for result in results:
        for each in result.evaluations:
            by_test.setdefault(each.split, []).append(score_of(each))
    return {
        "solved": len(solved),
        "of": seeds,
        "interval": [float(interval.low), float(interval.high)],
        "steps": [statistics.median(steps), min(steps), max(steps)] if steps else [],
        "excess": any(r.evaluations[0].best is not None for r in results),
        "tests": {label: statistics.median(values) for label, values in by_test.items()},
    }


def _range(steps: Sequence[float]) -> str:
    if not steps:
        return DASH
    middle, low, high = steps
    return f"{middle:,.0f}" if low == high else f"{middle:,.0f} ({low:,} to {high:,})"


def by_test(outcome: Outcome) -> list[tuple[str, list[Fan]]]:
    """Every variant's score over the tests, a panel for each place of the grid."""

    def scores(result: RunResult) -> dict[str, float]:
        return {each.split: score_of(each) for each in result.evaluations}

    return [(place, _fans(rows, scores)) for place, rows in _panels(outcome).items()]


def by_distance(outcome: Outcome) -> list[tuple[str, list[Fan]]]:
    """Every variant's score over the distance that an answer reaches back, a panel a test."""

    def scores(test: str, result: RunResult) -> dict[str, float]:
        found = result.evaluation(test)
        return {} if found is None else {n: score_of(part) for n, part in found.parts.items()}

    tests = dict.fromkeys(each.split for r in outcome.results for each in r.evaluations)
    return [
        (f"{place}, test {test}".removeprefix(", "), _fans(rows, partial(scores, test)))
        for place, rows in _panels(outcome).items()
        for test in tests
    ]


def _fans(
    rows: Sequence[tuple[str, Row]], scores: Callable[[RunResult], dict[str, float]]
) -> list[Fan]:
    """Of each variant, the scores of the seeds that have any."""
    return [
        Fan(label, [found for result in results_of(row) if (found := scores(result))])
        for label, row in rows
    ]


def _panels(outcome: Outcome) -> dict[str, list[tuple[str, Row]]]:
    """Place of the grid -> its variants, with the labels that they have apart from the place."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for row in outcome.rows:
        variant = row.variant
        label = variant.base if variant.places else variant.label
        found.setdefault(", ".join(variant.places.values()), []).append((label, row))
    return found
