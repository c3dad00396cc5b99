"""The run folder: where a training run keeps everything that evaluation and reports need."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pha.utils.errors import PHAError
from pha.utils.files import read_json, write_text


@dataclass(frozen=True)
class RunFolder:
    """Names inside `runs/NAME/`.

    - `config.yaml`: the fully resolved configuration.
    - `metrics.jsonl`: one JSON object per line, its `kind` one of `train`, `eval`, `mixing`.
    - `checkpoints/step-N/`: weights, optimiser state and position, enough to resume exactly.
    - `best/step-N/`: the weights of the best evaluations, where several are kept.
    - `averaged/`: the mean of the best of them.
    - `model/`: the chosen weights. All of these load with `from_pretrained`.
    - `result.json`: metrics, protocol, tokens seen, provenance; present only when finished.
    - `diverged.json`: the step and the place where a number was not finite, if the run ended so.
    - `report.html`.
    - `.lock`, `.owner`: keep a second process away while one trains.
    """

    path: Path

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """`config.yaml`."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """`metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """`checkpoints/`."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """`best/`."""
        return self.path / "best"

    @property
    def averaged(self) -> Path:
        """`averaged/`."""
        return self.path / "averaged"

    @property
    def model(self) -> Path:
        """`model/`."""
        return self.path / "model"

    @property
    def result(self) -> Path:
        """`result.json`."""
        return self.path / "result.json"

    @property
    def diverged(self) -> Path:
        """`diverged.json`."""
        return self.path / "diverged.json"

    @property
    def report(self) -> Path:
        """`report.html`."""
        return self.path / "report.html"

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

    @property
    def owner(self) -> Path:
        """`.owner`: which process holds the lock."""
        return self.path / ".owner"

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

    def read_metrics(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the records of `metrics.jsonl` in order, all or those of one `kind`.

        A last line cut short by a kill is skipped; any other bad line is an error.

        Raises:
            PHAError: a line that is not JSON.
        """
        if not self.metrics.is_file():
            return
        lines = self.metrics.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    return
                raise PHAError(f"{self.metrics}, line {number}, is not JSON") from error
            if kind is None or record.get("kind") == kind:
                yield record

    def read_result(self) -> dict[str, Any]:
        """The content of `result.json`.

        Raises:
            PHAError: the run has not finished, or the file is damaged.
        """
        if not self.result.is_file():
            raise PHAError(f"{self.path} has no result.json: the run has not finished (resume it)")
        result: dict[str, Any] = read_json(self.result)
        return result


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit())
