"""What the numerics watch costs of a whole training run on the CPU, in processor time.

    python scripts/watch_cost.py --data STORE --out results/reliability

Runs with the watch at its usual interval and runs without take turns, and so do runs of a single
step, whose time is start and end: what the others take beyond it is their steps. Processor time is
compared, as other processes may share the machine. All get one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pha.train.config import RunConfig
from pha.utils.files import write_json
from pha.utils.hardware import provenance

SETTINGS = {
    "data.sequence_length": 128,
    "run.global_batch": 4,
    "run.precision": "fp32",
    "run.evaluate_tokens": 2000,
    "run.sample_tokens": 0,
}


def processor_seconds(words: list[str]) -> float:
    """User and system time of `pha train`, in a process of its own with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pha", "train", *words, "--out", f"{folder}/run"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure(recipe: str, data: str, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of every run, and the watch's share of the time of the steps."""
    every = RunConfig().watch_every
    words = [recipe, "--data", data, *(f"--{name}={value}" for name, value in SETTINGS.items())]
    kinds = {"without": (steps, 0), "with": (steps, every), "one step": (1, 0)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds):
        # Every other round goes backwards, so that what drifts meets all alike.
        for kind in list(kinds)[:: -1 if turn % 2 else 1]:
            count, interval = kinds[kind]
            more = [f"--run.steps={count}", f"--run.watch_every={interval}"]
            seconds[kind].append(round(processor_seconds([*words, *more]), 2))
            print(turn, kind, seconds[kind][-1], flush=True)
    middle = {kind: median(values) for kind, values in seconds.items()}
    ratios = [a / b - 1 for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    more = middle["with"] - middle["without"]
    return {
        "recipe": recipe,
        "settings": SETTINGS,
        "steps": steps,
        "watch_every": every,
        "seconds": seconds,
        "of_whole_runs": round(more / middle["without"], 4),
        "of_whole_runs_by_round": [round(ratio, 4) for ratio in ratios],
        "of_steps": round(more / (middle["without"] - middle["one step"]), 4),
    }


def main() -> None:
    """Read the options, measure, and write watch-cost.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="pha-tiny.text")
    parser.add_argument("--data", required=True, help="a store")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder for watch-cost.json")
    options = parser.parse_args()
    found = measure(options.recipe, options.data, options.steps, options.rounds)
    content = {"kind": "watch-cost", "protocol": __doc__, **found}
    content["provenance"] = provenance(torch.device("cpu"), "fp32")
    write_json(options.out / "watch-cost.json", content)
    print(json.dumps({name: content[name] for name in ("of_whole_runs", "of_steps")}))


if __name__ == "__main__":
    main()
