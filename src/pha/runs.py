"""The run folder: where a training run keeps everything that evaluation and reports need."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pha.results import CONFIG_FORMAT, KINDS, METRICS_FORMAT, Metrics, RunResult
from pha.utils.errors import PHAError
from pha.utils.files import followed, remove_leftovers, write_text
from pha.utils.formats import parse_json, read_yaml
from pha.utils.outputs import hold, require_folder
from pha.utils.records import record_from
from pha.utils.versions import check_format


class RunFolder:
    """Names inside `runs/NAME/`. All folders of weights load with `from_pretrained`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # the fully resolved configuration
        self.metrics = path / "metrics.jsonl"  # a JSON object per line; its `kind` is of `KINDS`
        self.checkpoints = path / "checkpoints"  # `step-N/`: enough to resume exactly
        self.best = path / "best"  # `step-N/`: weights of the best evaluations, if several are kept
        self.averaged = path / "averaged"  # the mean of the best of them
        self.model = path / "model"  # the chosen weights
        self.result = path / "result.json"  # present only when finished
        self.diverged = path / "diverged.json"  # the step and the place, if the run ended so
        self.tracker = path / "tracker.txt"  # what trackers know the run by, to go on with it
        self.owner = path / ".owner"  # which process holds the lock, `.lock`

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep the folder, which is made if need be, from every other process meanwhile.

        What killed ones left half-written is removed first. See `hold`.

        Raises:
            PHAError: another process holds it; its number and machine are in the message.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with hold(self.path / ".lock", self._refusal) as is_held:
            for folder in (self.path, self.checkpoints, self.best):
                remove_leftovers(folder, held=is_held, elsewhere=is_held)
            for place in map(followed, (self.model, self.averaged)):  # which links may lead to
                remove_leftovers(place.parent, place.name, held=is_held, elsewhere=is_held)
            try:
                # Not in the locked file, which other processes cannot read on Windows.
                write_text(self.owner, f"process {os.getpid()} on {platform.node()}\n")
                yield
            finally:
                with suppress(OSError):  # which would hide what went wrong before
                    self.owner.unlink()

    def _refusal(self) -> str:
        try:
            owner = self.owner.read_text(encoding="utf-8").strip()
        except OSError:  # it has just begun, or just ended
            owner = "another process"
        return f"{self.path} is in use by {owner}; let it finish, or choose another --out"

    def require_usable(self) -> None:
        """Refuse a folder in which training would fail, or would touch what is not of a run.

        Raises:
            PHAError: it cannot be made or written, or holds files that are no run's.
        """
        require_folder(self.path)
        config = self.read_config()
        if not all(isinstance(config.get(part), dict) for part in ("model", "data", "run")):
            for path in set(vars(self).values()) - {self.path, self.owner}:
                if path.is_dir() and not any(path.iterdir()):
                    continue  # such as a link to a larger disk
                if os.path.lexists(path):
                    raise PHAError(
                        f"{self.path} is no training run and holds {path.name}, which training "
                        "would replace; choose another --out"
                    )
        for folder in (self.checkpoints, self.best):
            require_folder(folder)
        for folder in (self.model, self.averaged):
            require_folder(folder, replaced=True)
            names = {entry.name for entry in folder.iterdir()} if folder.is_symlink() else set()
            if names and not {"config.json", "model.safetensors"} <= names:
                raise PHAError(
                    f"{folder} leads to {followed(folder)}, which holds files of no model and "
                    "would be replaced; remove the link, or let it lead to an empty folder"
                )

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
            PHAError: the file is damaged or of a newer format.
        """
        content = read_yaml(self.config) if self.config.is_file() else {}
        check_format(self.config, content.get("format", 0), CONFIG_FORMAT)
        for section in ("model", "data", "run"):
            if not isinstance(content.get(section, {}), dict):
                raise PHAError(f"{self.config} is not of a run of ours: {section} is no mapping")
        modules = content.get("run", {}).get("imports", [])
        if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
            raise PHAError(f"{self.config} is damaged: run.imports is no list of names")
        return content

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
        try:
            lines = self.metrics.read_bytes().split(b"\n") if self.metrics.is_file() else []
        except OSError as error:
            raise PHAError(f"{self.metrics} cannot be read ({error.strerror})") from error
        for number, line in enumerate(filter(None, lines), start=1):
            where = f"{self.metrics}, line {number}"
            try:
                record = parse_json(line.decode())
                kind = record.get("kind")
            except (ValueError, AttributeError) as error:
                if line is lines[-1]:
                    break
                raise PHAError(f"{where}, is not a JSON object") from error
            if kind == "format":
                check_format(self.metrics, record.get("format"), METRICS_FORMAT)
            if isinstance(kind, str) and kind in KINDS:
                found[kind].append(record_from(KINDS[kind], record, where))
        return Metrics(**found)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit())
