"""metrics.jsonl, and the trackers that mirror it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from accelerate import Accelerator


class MetricsWriter:
    """Appends records to metrics.jsonl from the main process; a context manager.

    Args:
        path: the file.
        keep_bytes: it is cut to this length first, so that a resumed run repeats no line.
        accelerator: tells the main process, and feeds TensorBoard and W&B.
    """

    def __init__(self, path: Path, keep_bytes: int, accelerator: Accelerator) -> None:
        self.path, self.keep_bytes, self.accelerator = path, keep_bytes, accelerator
        self.file: IO[str] | None = None

    def __enter__(self) -> MetricsWriter:
        if self.accelerator.is_main_process:
            self.path.touch()
            os.truncate(self.path, min(self.keep_bytes, self.path.stat().st_size))
            self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, kind: str, step: int, tokens: int, **values: Any) -> None:
        """Append one record."""
        if self.file is None:
            return
        record = {"kind": kind, "step": step, "tokens": tokens, **values}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        scalars = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        if scalars:
            self.accelerator.log(scalars, step=step)

    def flush(self) -> int:
        """Bring everything to disk and return the file's length."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size
