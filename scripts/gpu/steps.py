"""One command of a stage: bounded in time, remembered when done, never the end of the rest."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pha.utils.files import read_json, write_json

SECONDS = "{seconds}"
"""In a command: the seconds it has, for one that can end by itself in good order."""

FOLDER = "{folder}"
"""In a command: the step's own folder."""

GRACE = 60.0
"""Seconds between asking a command to end and ending it; a training run writes a checkpoint."""

SHORTEST = 5.0
"""Seconds under which no command is begun."""

INTERRUPTED = 130


@dataclass(frozen=True)
class Step:
    """A command with a name.

    Attributes:
        stage: which stage it belongs to.
        name: its folder's name, unlike that of any other step.
        command: words, with `SECONDS` and `FOLDER` replaced where they occur.
        output: name of a file in its folder that takes what it prints; the log, if not given.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    output: str = ""

    @property
    def key(self) -> str:
        """What a finished record must have to count for this step."""
        return hashlib.sha256(json.dumps(self.command).encode()).hexdigest()[:16]


def finished(step: Step, work: Path) -> bool:
    """Whether this very command has been done."""
    record = read_record(work / step.name)
    return bool(record and record["key"] == step.key and record["status"] == "ok")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record that `run_step` left in a step's folder, if any."""
    path = folder / "record.json"
    record: dict[str, Any] | None = read_json(path) if path.is_file() else None
    return record


def run_step(step: Step, work: Path, seconds: float) -> dict[str, Any]:
    """Run a command in `work/NAME`, which takes its log and its record.

    Args:
        step: what to run.
        work: folder of all steps.
        seconds: how long it may take. It is then interrupted, and killed `GRACE` seconds later.

    Returns:
        `stage`, `name`, `key`, `command`, `status` (ok, failed, or unfinished for one that ran out
        of time), `seconds`, `returncode`, `began`, and `reason`: the last line of the log of one
        that failed.
    """
    folder = work / step.name
    folder.mkdir(parents=True, exist_ok=True)
    values = {SECONDS: str(int(seconds)), FOLDER: str(folder)}
    command = [_fill(word, values) for word in step.command]
    began, start = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    log = folder / "log.txt"
    if seconds < SHORTEST:
        code, late = None, True
    else:
        code, late = _run(command, log, folder / step.output if step.output else None, seconds)
    status = "ok" if code == 0 else "failed"
    if late or code == INTERRUPTED or (code == 0 and _out_of_time(folder)):
        status = "unfinished"
    record = {
        "stage": step.stage,
        "name": step.name,
        "key": step.key,
        "command": command,
        "status": status,
        "seconds": time.monotonic() - start,
        "returncode": code,
        "began": began,
        "reason": _last_line(log) if status == "failed" else "",
    }
    write_json(folder / "record.json", record)
    return record


def _fill(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _run(
    command: list[str], log: Path, output: Path | None, seconds: float
) -> tuple[int | None, bool]:
    """Exit code, None if it could not be started, and whether it ran out of time."""
    with log.open("a", encoding="utf-8") as sink:
        sink.write(f"$ {' '.join(command)}\n")
        sink.flush()
        target = sink if output is None else output.open("w", encoding="utf-8")
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=target, stderr=sink, process_group=0
            )
        except OSError as error:
            sink.write(f"{error}\n")
            return None, False
        finally:
            if output is not None:
                target.close()
    try:
        return process.wait(seconds), False
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        try:
            return process.wait(GRACE), True
        except subprocess.TimeoutExpired:
            return None, True
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the command and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _out_of_time(folder: Path) -> bool:
    """Whether a benchmark left rows out because of its limit."""
    return any(
        "time limit" in (row["error"] or "")
        for path in folder.glob("bench-*.json")
        for row in read_json(path)["rows"]
    )


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
