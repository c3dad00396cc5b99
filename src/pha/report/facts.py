"""Protocol, provenance and settings of runs, side by side, with what differs marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pha.report.collect import Run
from pha.utils.text import DASH, flatten, plain

# No two runs agree in these, and nothing follows from that.
_OWN = {"folder", "date", "command"}


@dataclass(frozen=True)
class Fact:
    """A row: its name, one value per run, and whether it is a condition that differs."""

    name: str
    values: list[str]
    differs: bool


def fact_groups(runs: Sequence[Run]) -> dict[str, list[Fact]]:
    """Heading -> how the figures of these runs came about."""
    by_run = [_sections(run) for run in runs]
    titles = dict.fromkeys(title for sections in by_run for title in sections)
    groups = {title: _facts([each.get(title, {}) for each in by_run]) for title in titles}
    if all(run.config for run in runs):
        settings = _facts([run.config for run in runs])
        groups["Settings that differ"] = [fact for fact in settings if fact.differs]
    return {title: facts for title, facts in groups.items() if facts}


def _sections(run: Run) -> dict[str, Mapping[str, Any]]:
    """Heading -> nested names and values."""
    result, own = run.result, {"folder": str(run.path)}
    if result is None:
        return {"Run": own | {"state": "unfinished"}}
    names = ("recipe", "seed", "steps", "chosen_step")
    sections = {"Run": own | {name: getattr(result, name) for name in names}}
    sections["Model"] = asdict(result.model)
    for index, each in enumerate(result.evaluations):
        sizes = {"tokens": each.tokens, "words": each.words, "bytes": each.bytes}
        number = "" if index == 0 else f" {index + 1}"
        sections[f"Evaluation{number}"] = {"split": each.split, **sizes, **each.protocol}
    if len(result.candidates) > 1:
        sections["Weights"] = {"chosen": result.chosen} | {
            each.name: {
                "steps": each.steps,
                "validation perplexity": f"{each.validation_perplexity:.3f}",
                f"{each.evaluation.split} perplexity": f"{each.evaluation.perplexity:.3f}",
            }
            for each in result.candidates
        }
    return sections | {"Data": result.data, "Software and hardware": result.provenance}


def _facts(runs: Sequence[Mapping[str, Any]]) -> list[Fact]:
    flat = [{key: _shown(value) for key, value in flatten(run)} for run in runs]
    facts = []
    for key in dict.fromkeys(key for run in flat for key in run):
        values = [run.get(key, DASH) for run in flat]
        # A value that one run lacks is unknown there, which is not a difference.
        differs = len(set(values) - {DASH}) > 1 and key not in _OWN
        facts.append(Fact(key.replace("_", " ").replace(".", ", "), values, differs))
    return facts


def _shown(value: Any) -> str:
    """Counts get separators."""
    return f"{value:,}" if type(value) is int and value >= 10_000 else plain(value)
