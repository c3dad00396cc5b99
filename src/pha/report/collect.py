"""Run folders -> what a page can show, nothing about how it looks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pha.results import EvalRecord, LayerMixing, Metrics, RunResult
from pha.runs import RunFolder
from pha.utils.errors import PHAError
from pha.utils.text import DASH, flatten, plain, shorten

# No two runs agree in these, and nothing follows from that.
_OWN = {"folder", "date", "command"}


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path  # of the folder
    label: str  # tells it apart from the other runs of the page
    result: RunResult | None  # None while the run is unfinished
    metrics: Metrics  # its history; all lists are empty where it has none
    config: Mapping[str, Any]  # empty where there is none

    @classmethod
    def of(cls, result: RunResult) -> Run:
        """A finished run of which nothing but the result is at hand."""
        return cls(Path(result.name), result.name, result, Metrics(), {})

    @property
    def tokens_seen(self) -> int | None:
        """Training tokens, so far or in all."""
        if self.result:
            return self.result.tokens_seen
        return self.metrics.train[-1].tokens if self.metrics.train else None

    @property
    def seconds(self) -> float | None:
        """Of training, so far or in all."""
        if self.result:
            return self.result.seconds
        return self.metrics.train[-1].seconds if self.metrics.train else None

    @property
    def mixing(self) -> Sequence[LayerMixing]:
        """Of the chosen weights, else the last one recorded."""
        if self.result:
            return self.result.mixing
        return self.metrics.mixing[-1].layers if self.metrics.mixing else ()

    def latest_eval(self, split: str) -> EvalRecord | None:
        """The evaluation made at the chosen step of training, else the last one made."""
        records = [record for record in self.metrics.eval if record.split == split]
        step = self.result.chosen_step if self.result else None
        best = [record for record in records if record.step == step] or records
        return best[-1] if best else None

    def diverged_at(self) -> int | None:
        """First step with a training loss that is not a finite number."""
        losses = ((record.step, record.loss) for record in self.metrics.train)
        return next((step for step, loss in losses if not math.isfinite(loss)), None)


def collect(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, in the order given.

    Raises:
        PHAError: no path, a folder given twice, one that is not a run, or a damaged file.
    """
    if not paths:
        raise PHAError("a report needs at least one run folder")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise PHAError(f"{path} is given twice")
        seen.add(path.resolve())
    folders = [_run_folder(path) for path in paths]
    results = [folder.read_result() if folder.result.is_file() else None for folder in folders]
    names = [r.name if r else folder.name for r, folder in zip(results, folders, strict=True)]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [
        Run(path, shorten(name, 80) or "run", result, folder.read_metrics(), folder.read_config())
        for path, name, result, folder in zip(paths, names, results, folders, strict=True)
    ]


def _run_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not path.is_dir():
        raise PHAError(f"{path} is not a run folder: there is no such folder")
    if not any(file.is_file() for file in (folder.config, folder.metrics, folder.result)):
        raise PHAError(
            f"{path} is not a run folder: it has no config.yaml, metrics.jsonl or result.json"
        )
    return folder


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
