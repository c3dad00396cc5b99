"""How fast `pha prepare` is, and the memory it takes, on a text of any size.

    python scripts/prepare_rate.py books --tokenizer gpt2:gpt2 --out prepare-rate.json \\
        --run 200x1x1 --run 200x2x1 --run 200x1x2 --run 4000x2x1

A run MBxCORESxPARTS prepares so many megabytes with so many cores for each process: in one process,
or in PARTS at a time, which `pha join` makes one store. The text is SOURCE over and over, in
documents of some 5,000 characters, each with a mark of its own, so that no two are equal. The
hours that 40 GB take, as OpenWebText has, are extrapolated. All stores of one text must be the
same. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from pha.data import open_source
from pha.data.encoding import cut
from pha.utils.files import write_json
from pha.utils.hardware import provenance

FILES = 16  # that a text is written to
DOCUMENT = 5_000  # characters, about as many as OpenWebText's documents have
OPENWEBTEXT = 40e9  # bytes
LOOK = 0.02  # seconds between two looks at a process


def documents(source: str) -> Iterator[str]:
    """Marked documents without end."""
    for copy in count():
        number = 0
        for document in open_source(source).documents("train"):
            for text in cut(document.parts, DOCUMENT):
                yield f"Copy {copy}, document {number}.\n{text}"
                number += 1


def write_text(source: str, folder: Path, size: int) -> None:
    """Write files of records with `size` bytes of text in all."""
    folder.mkdir()
    texts, written = documents(source), 0
    for number in range(FILES):
        with (folder / f"text-{number:02}.jsonl").open("w", encoding="utf-8") as file:
            while written * FILES < size * (number + 1):
                text = next(texts)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())


def watch(commands: Sequence[Sequence[str]], cores: int) -> dict[str, float]:
    """Run commands at once, each on cores of its own: seconds, of processors too, and peak bytes.

    The peak is the sum of those of all processes, as the system counted resident memory.
    """
    mine = sorted(os.sched_getaffinity(0))
    peaks, processor_seconds, begin = [0] * len(commands), 0.0, time.perf_counter()
    running = {}
    for number, command in enumerate(commands):
        here = [mine[(number * cores + n) % len(mine)] for n in range(cores)]
        pin = ["taskset", "--cpu-list", ",".join(map(str, here))]
        process = subprocess.Popen([*pin, *command], stdout=subprocess.DEVNULL)
        running[process.pid] = number
    while running:
        time.sleep(LOOK)
        for pid, number in list(running.items()):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peaks[number] = max(peaks[number], int(line.split()[1]) * 1024)
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                del running[pid]
                processor_seconds += usage.ru_utime + usage.ru_stime
                if status:
                    raise SystemExit(f"{commands[number]} failed")
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "processor_seconds": processor_seconds, "peak_bytes": sum(peaks)}


def measure(text: Path, tokenizer: str, store: Path, cores: int, parts: int) -> dict[str, Any]:
    """Prepare a text: its effort, and what came of it."""
    pha = [sys.executable, "-m", "pha"]
    prepare = [*pha, "prepare", str(text), "--tokenizer", tokenizer, "--out", str(store)]
    if parts == 1:
        found = watch([prepare], cores)
    else:
        found = watch([[*prepare, "--part", f"{k}/{parts}"] for k in range(1, parts + 1)], cores)
        found["join_seconds"] = watch([[*pha, "join", str(store)]], cores)["seconds"]
    splits = json.loads((store / "store.json").read_text())["splits"]
    counts = {key: sum(each[key] for each in splits.values()) for key in ("bytes", "tokens")}
    seconds = found["seconds"] + found.get("join_seconds", 0)
    return {
        **found,
        **counts,
        "bytes_per_second": counts["bytes"] / seconds,
        "tokens_per_second": counts["tokens"] / seconds,
        "bytes_per_processor_second": counts["bytes"] / found["processor_seconds"],
        "openwebtext_hours": OPENWEBTEXT / counts["bytes"] * seconds / 3600,
        "openwebtext_tokens": OPENWEBTEXT / counts["bytes"] * counts["tokens"],
        "sha256": [splits[split]["sha256"] for split in splits],
    }


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="what `pha prepare` takes")
    parser.add_argument(
        "--tokenizer", required=True, help="not bpe:SIZE, which every run would train"
    )
    parser.add_argument("--run", action="append", required=True, metavar="MBxCORESxPARTS")
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=".") as name:
        text, made = Path(name, "text"), 0
        for run in arguments.run:
            megabytes, cores, parts = map(int, run.split("x"))
            if megabytes != made:
                shutil.rmtree(text, ignore_errors=True)
                write_text(arguments.source, text, megabytes * 10**6)
                made = megabytes
            found = measure(text, arguments.tokenizer, Path(name, "store"), cores, parts)
            shutil.rmtree(Path(name, "store"))
            same = {str(r["sha256"]) for r in runs if r["megabytes"] == megabytes}
            assert same <= {str(found["sha256"])}, "the same text has given another store"
            runs.append({"megabytes": megabytes, "cores": cores, "parts": parts} | found)
            print(
                f"{megabytes} MB, {parts} x {cores} cores: {found['bytes_per_second'] / 1e6:.2f} "
                f"MB/s, {found['tokens_per_second']:,.0f} tokens/s, "
                f"{found['bytes_per_processor_second'] / 1e6:.2f} MB for each second of a "
                f"processor, {found['peak_bytes'] / 1e6:.0f} MB at most, 40 GB in "
                f"{found['openwebtext_hours']:.1f} h",
                flush=True,
            )
            if arguments.out:
                facts = provenance(torch.device("cpu"), "none")
                write_json(arguments.out, {"runs": runs, "provenance": facts})


if __name__ == "__main__":
    main()
