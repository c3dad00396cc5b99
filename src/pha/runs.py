"""The run folder: where a training run keeps everything that evaluation and reports need."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from pha.results import KINDS, Metrics, RunResult
from pha.utils.errors import PHAError
from pha.utils.files import write_text
from pha.utils.records import record_from


class RunFolder:
    """Names inside `runs/NAME/`.

    Attributes:
        path: of the folder.
        config: `config.yaml`, the fully resolved configuration.
        metrics: `metrics.jsonl`, a JSON object per line; its `kind` is one of `KINDS`.
        checkpoints: `checkpoints/step-N/`: weights, optimiser state and position, enough to
            resume exactly.
        best: `best/step-N/`: the weights of the best evaluations, where several are kept.
        averaged: the mean of the best of them.
        model: the chosen weights. All of these load with `from_pretrained`.
        result: `result.json`; present only when finished.
        diverged: `diverged.json`: the step and the place where a number was not finite, if the
            run ended so.
        report: `report.html`.
        owner: `.owner`: which process holds the lock, `.lock`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.averaged = path / "averaged"
        self.model = path / "model"
        self.result = path / "result.json"
        self.diverged = path / "diverged.json"
        self.report = path / "report.html"
        self.owner = path / ".owner"

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep the folder, which is made if need be, from every other process meanwhile.

        The system holds the lock, not the file: it ends with this process, however that ends. On a
        file system without locks there is none.

        Raises:
            PHAError: another process holds it; its number and machine are in the message.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            try:
                owner = self.owner.read_text(encoding="utf-8").strip()
            except OSError:  # it has just begun, or just ended
                owner = "another process"
            raise PHAError(
                f"{self.path} is in use by {owner}; let it finish, or choose another --out"
            ) from error
        except OSError:
            yield
            return
        try:
            # Not in the locked file, which other processes cannot read on Windows.
            write_text(self.owner, f"process {os.getpid()} on {platform.node()}\n")
            yield
        finally:
            self.owner.unlink(missing_ok=True)
            lock.release()

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint taken after `step` optimiser steps."""
        return self.checkpoints / f"step-{step}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending (unfinished ones have other names)."""
        return _steps(self.checkpoints)

    def best_model(self, step: int) -> Path:
        """The folder of the weights kept after `step` optimiser steps."""
        return self.best / f"step-{step}"

    def best_steps(self) -> list[int]:
        """Steps whose weights are kept in `best/`, ascending."""
        return _steps(self.best)

    def read_config(self) -> dict[str, Any]:
        """The content of `config.yaml`; empty where there is none.

        Raises:
            PHAError: the file is damaged.
        """
        if not self.config.is_file():
            return {}
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise PHAError(f"{self.config} cannot be read as text") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}," if mark else ""
            raise PHAError(f"{self.config}{where} is not YAML") from error
        if not isinstance(config, dict):
            raise PHAError(f"{self.config} holds no names and values")
        return config

    def read_result(self) -> RunResult:
        """The run's result.

        Raises:
            PHAError: the run has not finished, or the file is damaged or of a newer version.
        """
        if not self.result.is_file():
            raise PHAError(f"{self.path} has no result.json: the run has not finished (resume it)")
        return RunResult.read(self.result)

    def read_metrics(self) -> Metrics:
        """The run's metrics so far; empty where there are none.

        A last line cut short by a kill is skipped; any other bad line is an error.

        Raises:
            PHAError: a line that is no record.
        """
        found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        for where, line in self._metric_lines():
            if not isinstance(line, dict):
                raise PHAError(f"{where}, is not a JSON object")
            kind = line.get("kind")
            if kind in KINDS:
                found[kind].append(record_from(KINDS[kind], line, where))
        return Metrics(**found)

    def _metric_lines(self) -> Iterator[tuple[str, Any]]:
        if not self.metrics.is_file():
            return
        try:
            lines = self.metrics.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise PHAError(f"{self.metrics} cannot be read as text") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{self.metrics}, line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    return
                raise PHAError(f"{where}, is not JSON") from error


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit())
