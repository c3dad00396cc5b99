"""metrics.jsonl, and the trackers that mirror it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import IO

from accelerate import Accelerator

from pha.results import KINDS, METRICS_FORMAT, Record
from pha.utils.formats import to_json


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
