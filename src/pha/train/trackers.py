"""metrics.jsonl and the trackers that mirror it, told enough to be one run after a resume too."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from accelerate import Accelerator
from accelerate.utils import LoggerType

from pha.results import KINDS, METRICS_FORMAT, Record
from pha.runs import RunFolder
from pha.train.config import TrainConfig
from pha.utils.errors import PHAError
from pha.utils.files import write_text
from pha.utils.formats import to_json
from pha.utils.text import did_you_mean

PROJECT = "pha"
TRACKERS = [str(kind.value) for kind in LoggerType if kind is not LoggerType.ALL]
"""Every one that Accelerate knows."""

_OWN_EXTRAS = ("tensorboard", "wandb")


def require_trackers(names: Sequence[str]) -> None:
    """Refuse, before anything is spent, trackers that are not there.

    Raises:
        PHAError: Accelerate knows no such tracker, or it is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS) or f"; there are {', '.join(TRACKERS)}"
            raise PHAError(f"run.trackers names {name}{hint}")
        if find_spec(name) is None:
            package = f"'pha-lm[{name}]'" if name in _OWN_EXTRAS else name.replace("_", "-")
            raise PHAError(f"{name} is not installed; run `pip install {package}`")


def start_trackers(accelerator: Accelerator, config: TrainConfig, run: RunFolder) -> None:
    """Begin or go on with the trackers of a run; nothing where it has none.

    Each gets the whole configuration, one value for each key, the name of the run folder, and the
    recipe as its group.
    """
    if not config.run.trackers:
        return
    settings: dict[str, Any] = {"recipe": config.recipe or "custom"}
    for section, values in config.to_dict().items():
        for key, value in values.items() if isinstance(values, dict) else ():
            plain = isinstance(value, bool | int | float | str)
            settings[f"{section}.{key}"] = value if plain else json.dumps(value)
    if accelerator.is_main_process and not run.tracker.is_file():
        write_text(run.tracker, uuid4().hex)
    identity = run.tracker.read_text(encoding="utf-8") if run.tracker.is_file() else ""
    options = _options(run.name, settings["recipe"], identity)
    chosen = {name: options.get(name, {}) for name in config.run.trackers}
    accelerator.init_trackers(PROJECT, config=settings, init_kwargs=chosen)


def _options(name: str, group: str, identity: str) -> dict[str, dict[str, Any]]:
    """What each tracker calls the name of a run, its group, and going on with it."""
    named = {"name": name, "group": group, "resume": "allow"}
    return {
        "wandb": {**named, "id": identity},
        "trackio": named,
        "swanlab": {"experiment_name": name, "id": identity[:21], "resume": "allow"},
        "comet_ml": {"experiment_key": identity},
        "clearml": {"task_name": name, "continue_last_task": True},
        "mlflow": {"run_name": name, "tags": {"group": group}},
        "dvclive": {"resume": True},
    }


class MetricsWriter:
    """Appends records to metrics.jsonl from the main process, and to trackers; a context manager.

    The file is cut to `keep_bytes` first, so that a resumed run repeats no line.
    """

    def __init__(self, path: Path, keep_bytes: int, accelerator: Accelerator) -> None:
        self.path, self.keep_bytes, self.accelerator = path, keep_bytes, accelerator
        self.file: IO[str] | None = None

    def __enter__(self) -> MetricsWriter:
        if self.accelerator.is_main_process:
            self.path.touch()
            os.truncate(self.path, min(self.keep_bytes, self.path.stat().st_size))
            self.file = self.path.open("a", encoding="utf-8")
            if self.file.tell() == 0:
                self.file.write(to_json({"kind": "format", "format": METRICS_FORMAT}) + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, record: Record) -> None:
        """Append one record."""
        if self.file is None:
            return
        values = asdict(record)
        [kind] = [kind for kind, of in KINDS.items() if isinstance(record, of)]
        self.file.write(to_json({"kind": kind, **values}) + "\n")
        self.file.flush()
        del values["step"], values["tokens"]
        scalars = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        if scalars:
            self.accelerator.log(scalars, step=record.step)

    def flush(self) -> int:
        """Bring everything to disk and return the file's length."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size
