"""What the numerics watch costs of a whole training run on the CPU, in processor time.

    python scripts/watch_cost.py --data STORE --out results/reliability

Runs with the watch at its usual interval and runs without take turns, and so do runs of a single
step, whose time is start and end: what the others take beyond it is their steps. The machine may be
shared, so processor time is compared, of one thread. It still varies with what the neighbours do to
caches; hence the time inside the watch's own calls is taken too, as a share of its own run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

SETTINGS = {
    "data.sequence_length": 128,
    "run.global_batch": 4,
    "run.precision": "fp32",
    "run.evaluate_tokens": 2000,
    "run.sample_tokens": 0,
}


def train_here(words: list[str]) -> None:
    """Train in this process, and print its processor seconds and those inside the watch."""
    from pha.cli import main
    from pha.train.watch import Watch

    inside = 0.0

    def timed(call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            nonlocal inside
            begin = time.process_time()
            try:
                return call(*arguments)
            finally:
                inside += time.process_time() - begin

        return wrapped

    for name in ("before", "gradients", "after"):
        setattr(Watch, name, timed(getattr(Watch, name)))
    main(["train", *words, "--quiet"])
    print(json.dumps({"run": round(time.process_time(), 3), "watch": round(inside, 3)}))


def train(words: list[str]) -> dict[str, float]:
    """The same in a process of its own with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", *words, "--out", f"{folder}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(recipe: str, data: str, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of every run, and the watch's share of the time of the steps."""
    from pha.train.config import RunConfig

    every = RunConfig().watch_every
    words = [recipe, "--data", data, *(f"--{name}={value}" for name, value in SETTINGS.items())]
    kinds = {"without": (steps, 0), "with": (steps, every), "one step": (1, 0)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    inside: list[float] = []
    for turn in range(rounds):
        # Every other round goes backwards, so that what drifts meets all alike.
        for kind in list(kinds)[:: -1 if turn % 2 else 1]:
            count, interval = kinds[kind]
            found = train([*words, f"--run.steps={count}", f"--run.watch_every={interval}"])
            seconds[kind].append(found["run"])
            if kind == "with":
                inside.append(found["watch"])
            print(turn, kind, found, flush=True)
    start = median(seconds["one step"])
    of_steps = {kind: median(values) - start for kind, values in seconds.items()}
    shares = [
        watch / (run - start - watch) for watch, run in zip(inside, seconds["with"], strict=True)
    ]
    return {
        "recipe": recipe,
        "settings": SETTINGS,
        "steps": steps,
        "watch_every": every,
        "seconds": seconds,
        "seconds_inside_the_watch": inside,
        "with_over_without": round(of_steps["with"] / of_steps["without"], 4),
        "inside_over_the_rest": {
            "median": round(median(shares), 4),
            "least": round(min(shares), 4),
            "most": round(max(shares), 4),
        },
    }


def run_all() -> None:
    """Read the options, measure, and write watch-cost.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="pha-tiny.text")
    parser.add_argument("--data", required=True, help="a store")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder for watch-cost.json")
    options = parser.parse_args()
    import torch

    from pha.utils.files import write_json
    from pha.utils.hardware import provenance

    found = measure(options.recipe, options.data, options.steps, options.rounds)
    content = {"kind": "watch-cost", "protocol": __doc__, **found}
    torch.set_num_threads(1)  # as the runs have
    content["provenance"] = provenance(torch.device("cpu"), "fp32")
    write_json(options.out / "watch-cost.json", content)


if __name__ == "__main__":
    train_here(sys.argv[2:]) if sys.argv[1:2] == ["--one"] else run_all()
