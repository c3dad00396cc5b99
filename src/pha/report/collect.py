"""Run folders -> what a page can show, nothing about how it looks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pha.results import EvalRecord, LayerMixing, Metrics, RunResult
from pha.runs import RunFolder
from pha.utils.errors import PHAError
from pha.utils.text import shorten


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
