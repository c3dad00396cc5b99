"""What all steps left, in a few small files: a page to read, a record to compute with, archives."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pha.utils.files import read_json, write_json, write_text
from scripts.gpu.stages import Plan, best_batch
from scripts.gpu.steps import read_record
from scripts.gpu.summary import summarise

LOG_BYTES = 200_000
"""Of each log this much of its end is kept."""

MOST_BYTES = 60_000_000

RUN_FILES = ("config.yaml", "metrics.jsonl", "result.json", "diverged.json")


def collect(plan: Plan, out: Path, gaps: dict[str, str]) -> str:
    """Write summary.md, results.json, benchmarks.tar.gz, pictures.tar.gz, runs.tar.gz, logs.tar.gz.

    Args:
        plan: where the steps ran.
        out: the folder, made if need be; other files in it stay.
        gaps: missing packages and what is lost without each.

    Returns:
        The name of the file to read first.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = gather(plan, gaps)
    write_json(out / "results.json", record)
    work = plan.work
    draw(record["benchmarks"], work / "pictures")
    archives = {
        "benchmarks": [
            (f"{p.parent.name}/{p.name}", p) for p in sorted(work.glob("*/bench-*.json"))
        ],
        "pictures": [(p.name, p) for p in sorted((work / "pictures").glob("*.png"))],
        "runs": [
            (f"{run.name}/{name}", run / name)
            for run in sorted(work.glob("runs/*"))
            for name in RUN_FILES
            if (run / name).is_file()
        ],
        "logs": [
            (f"{p.parent.name}/{p.name}", p)
            for p in sorted(work.glob("*/*"))
            if p.suffix in (".txt", ".xml", ".json") and not p.name.startswith("bench-")
        ],
    }
    for name, files in archives.items():
        pack(out / f"{name}.tar.gz", files)
    write_text(out / "summary.md", "\n".join(summarise(record)) + "\n")
    size = sum(p.stat().st_size for p in out.iterdir() if p.is_file())
    if size > MOST_BYTES:
        print(f"{out} holds {size / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f} MB")
    return "summary.md"


def gather(plan: Plan, gaps: dict[str, str]) -> dict[str, Any]:
    """Everything as one record: steps, environment, rows of all benchmarks by step, runs."""
    work = plan.work
    records = [read_record(folder) for folder in work.iterdir() if folder.is_dir()]
    steps = sorted((r for r in records if r is not None), key=lambda r: r["began"])
    doctor = work / "doctor" / "doctor.json"
    runs = {
        run.name: read_json(run / "result.json")
        for run in sorted(work.glob("runs/*"))
        if (run / "result.json").is_file()
    }
    return {
        "commit": os.environ.get("PHA_COMMIT"),
        "missing_packages": gaps,
        "environment": read_json(doctor) if _whole(doctor) else None,
        "steps": steps,
        "tests": _test_counts(work / "tests" / "tests.xml"),
        "benchmarks": {step["name"]: rows for step in steps if (rows := plan.result(step["name"]))},
        "fastest_training": best_batch(plan, compiled=True),
        "runs": runs,
    }


def draw(benchmarks: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Pictures of speed and memory against length, of prompts and decoding."""
    try:
        from pha.report.speed import save_speed_plots

        folder.mkdir(exist_ok=True)
        for mode in ("prefill", "decode"):
            rows = [row for rows in benchmarks.values() for row in rows if row["mode"] == mode]
            save_speed_plots(mode, rows, folder)
    except ImportError as error:
        print(f"no pictures: {error.name} is not installed")


def _whole(path: Path) -> bool:
    """Whether a command that prints JSON got as far as printing it."""
    return path.is_file() and path.stat().st_size > 0


def _test_counts(path: Path) -> dict[str, int] | None:
    if not path.is_file():
        return None
    suites = ElementTree.parse(path).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    return counts


def pack(path: Path, files: list[tuple[str, Path]]) -> None:
    """A compressed archive of files under new names, written whole; of long logs only the end."""
    if not files:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with tarfile.open(temporary, "w:gz") as archive:
        for name, file in files:
            content = file.read_bytes()
            if file.suffix == ".txt":
                content = content[-LOG_BYTES:]
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), int(file.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(content))
    temporary.replace(path)
