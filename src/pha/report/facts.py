"""Protocol, provenance and settings of runs, side by side, with what differs marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pha.report.collect import Run
from pha.results import Evaluation
from pha.utils.text import DASH, duration, fixed, flatten, memory, percent, plain, printable

# What a run gave, where and when: no two runs agree in these, and nothing follows from that.
_OUTCOMES = {
    "folder",
    "training time",
    "tokens per second",
    "share of the measured matmul rate",
    "peak memory",
    "loss, nats per token",
    "perplexity per token",
    "time",
    "date",
    "command",
}
_COUNTS = ("tokens", "bytes", "words", "lines", "documents", "tokens_scored", "vocab_size")


@dataclass(frozen=True)
class Fact:
    """A row: its name, one value per run, and whether it is a condition that differs."""

    name: str
    values: list[str]
    differs: bool


@dataclass(frozen=True)
class Group:
    """Facts under a common heading."""

    title: str
    facts: list[Fact]


def fact_groups(runs: Sequence[Run]) -> list[Group]:
    """How the figures of these runs came about."""
    evaluations = [_named_evaluations(run) for run in runs]
    names = dict.fromkeys(name for named in evaluations for name in named)
    groups = [
        _group("Run", [_run_facts(run) for run in runs]),
        _group("Model", [_model_facts(run) for run in runs]),
        *(
            _group(name, [_evaluation_facts(named.get(name)) for named in evaluations])
            for name in names
        ),
        _group("Weights", [_weights_facts(run) for run in runs], outcomes=True),
        _group("Data", [_nested_facts(run.data) for run in runs]),
        _group("Software and hardware", [_nested_facts(run.provenance) for run in runs]),
        Group("Settings that differ", _differing_settings(runs)),
    ]
    return [group for group in groups if group.facts]


def _group(title: str, runs: Sequence[Mapping[str, str]], outcomes: bool = False) -> Group:
    facts = []
    for name in dict.fromkeys(name for facts_of_run in runs for name in facts_of_run):
        values = [facts_of_run.get(name, DASH) for facts_of_run in runs]
        # A value that one run lacks is unknown there, which is not a difference.
        differs = len(set(values) - {DASH}) > 1 and name not in _OUTCOMES and not outcomes
        facts.append(Fact(name, values, differs))
    return Group(title, facts)


def _run_facts(run: Run) -> dict[str, str]:
    result = run.result
    return {
        "folder": printable(str(run.path)),
        "state": "finished" if run.result is not None else "unfinished",
        "recipe": plain(run.recipe),
        "seed": plain(run.seed),
        "optimiser steps": fixed(run.steps, 0),
        "step of the chosen weights": fixed(run.result.chosen_step if run.result else None, 0),
        "tokens seen": fixed(run.tokens_seen, 0),
        "training time": duration(run.seconds),
        "tokens per second": fixed(run.tokens_per_second, 0),
        "share of the measured matmul rate": percent(
            run.result.utilisation if run.result else None
        ),
        "peak memory": memory(result.peak_memory_bytes if result else None),
    }


def _model_facts(run: Run) -> dict[str, str]:
    if run.result is None:
        return {}
    facts = {"preset": plain(run.result.model.preset)}
    for key, value in flatten(asdict(run.result.model.parameters)):
        facts[f"parameters, {_words(key.removeprefix('components.'))}"] = fixed(value, 0)
    return facts


def _weights_facts(run: Run) -> dict[str, str]:
    """What the weights were chosen from, where there was a choice."""
    if run.result is None or len(run.result.candidates) < 2:
        return {}
    facts = {"chosen": plain(run.result.chosen)}
    for candidate in run.result.candidates:
        scores = candidate.evaluation
        facts[f"{candidate.name}, from steps"] = ", ".join(map(str, candidate.steps))
        facts[f"{candidate.name}, validation perplexity"] = fixed(
            candidate.validation_perplexity, 3
        )
        facts[f"{candidate.name}, {candidate.evaluation.split} perplexity"] = fixed(
            scores.perplexity, 3
        )
    return facts


def _named_evaluations(run: Run) -> dict[str, Evaluation]:
    """Evaluations by heading; several on one split (other strides, say) are numbered."""
    named: dict[str, Evaluation] = {}
    for evaluation in run.evaluations:
        name = f"Evaluation on {evaluation.split}"
        number_on_split = sum(heading.startswith(name) for heading in named) + 1
        named[name if number_on_split == 1 else f"{name}, {number_on_split}"] = evaluation
    return named


def _evaluation_facts(evaluation: Evaluation | None) -> dict[str, str]:
    if evaluation is None:
        return {}
    return {
        "loss, nats per token": fixed(evaluation.loss, 4),
        "perplexity per token": fixed(evaluation.perplexity, 3),
        "tokens": fixed(evaluation.tokens, 0),
        "words": fixed(evaluation.words, 0),
        "bytes": fixed(evaluation.bytes, 0),
        "time": duration(evaluation.seconds),
        **_nested_facts(evaluation.protocol),
    }


def _nested_facts(mapping: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    for key, value in flatten(mapping):
        counts = key.rpartition(".")[2] in _COUNTS and isinstance(value, int | float)
        facts[_words(key)] = fixed(value, 0) if counts else plain(value)
    return facts


def _differing_settings(runs: Sequence[Run]) -> list[Fact]:
    """The keys of `config.yaml` that do not have the same value in all runs that have one."""
    configs = [dict(flatten(run.config)) for run in runs if run.config]
    if len(configs) < len(runs):
        return []
    facts = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [plain(config.get(key)) for config in configs]
        if len(set(values)) > 1:
            facts.append(Fact(key, values, True))
    return facts


def _words(key: str) -> str:
    return key.replace("_", " ").replace(".", ", ")
