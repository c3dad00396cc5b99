r"""What `pha train --dry-run --devices N` says beside what N processes on this machine take.

    python scripts/scaling.py --data STORE --out results/scaling
    python scripts/scaling.py --data STORE --out results/scaling --name pieces \
      --recipe pha-tiny.text --data.sequence_length=16384 --run.global_batch=1 \
      --run.context_parallel={processes}

Each run takes a few steps on the CPU under torchrun, one thread a process. Memory is the highest
resident size of a process until its last step, less what it was before there was a model: the
evaluation that follows reads whole sequences in every process. Traffic is what went over the
loopback interface in a step, of which each process sent its part. The planned time is that of as
many devices; processes with less than a core each cannot keep to it. Nothing else may run on the
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil

SETTINGS = {
    "data.sequence_length": 128,
    "run.global_batch": 8,
    "run.precision": "fp32",
    "run.evaluate_every": 1000,  # the last step alone
    "run.evaluate_tokens": 1000,
    "run.sample_tokens": 0,
    "run.watch_every": 0,
}


def train_here(words: list[str], into: Path) -> None:
    """Train in this process, one of several; write what it took to a file of its own."""
    from pha.cli import main
    from pha.train import run, trainer
    from pha.utils.hardware import peak_memory

    # The end of each: when, bytes over the loopback, and the most memory until then.
    steps: list[tuple[float, int, int]] = []
    base = 0
    make_model, step, finish = run.make_model, trainer.Trainer._step, trainer.Trainer.train

    def before(*arguments: Any) -> Any:
        nonlocal base
        base = psutil.Process().memory_info().rss
        return make_model(*arguments)

    def counted(self: trainer.Trainer, *arguments: Any) -> Any:
        taken = step(self, *arguments)
        sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
        steps.append((time.perf_counter(), sent, peak_memory(self.accelerator.device)))
        return taken

    def trained(self: trainer.Trainer) -> Any:
        progress = finish(self)
        found = {"base": base, "peak": steps[-1][2], "steps": steps}
        (into / f"{self.accelerator.process_index}.json").write_text(json.dumps(found))
        return progress

    setattr(run, "make_model", before)  # noqa: B010
    setattr(trainer.Trainer, "_step", counted)  # noqa: B010
    setattr(trainer.Trainer, "train", trained)  # noqa: B010
    main(["train", *words, "--quiet"])


def plan(words: list[str], processes: int) -> dict[str, Any]:
    """What the calculator says."""
    command = [sys.executable, "-m", "pha", "train", *words, "--dry-run", "--json"]
    command += ["--devices", str(processes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)["plan"]
    return found


def measure(words: list[str], processes: int) -> dict[str, Any]:
    """Seconds and bytes of a step, the median over all but the first; memory, the most of any."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", __file__, "--one", folder, *words]
        subprocess.run([*command, "--out", f"{folder}/run"], check=True)
        ranks = [json.loads((Path(folder) / f"{n}.json").read_text()) for n in range(processes)]
    pairs = list(pairwise(ranks[0]["steps"]))
    return {
        "seconds": median(b[0] - a[0] for a, b in pairs),
        "sent": median(b[1] - a[1] for a, b in pairs) / processes,
        "memory": max(rank["peak"] - rank["base"] for rank in ranks),
        "base": max(rank["base"] for rank in ranks),
    }


def compare(words: list[str], processes: int) -> dict[str, Any]:
    """Plan and measurement for one number of processes."""
    words = [word.replace("{processes}", str(processes)) for word in words]
    planned, measured = plan(words, processes), measure(words, processes)
    held = ("weights_bytes", "activation_bytes", "carried_bytes")
    said = {
        "seconds": planned["seconds"] / planned["steps"],
        "sent": planned["gradient_bytes"] + sum(planned["gathered_bytes"].values()),
        "memory": sum(planned[key] for key in held),
    }
    ratios = {key: measured[key] / value if value else None for key, value in said.items()}
    return {
        "processes": processes,
        "planned": said,
        "measured": measured,
        "measured_over_planned": ratios,
    }


def main() -> None:
    """Read options, measure, write JSON."""
    if sys.argv[1:2] == ["--one"]:
        train_here(sys.argv[3:], Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help="token store")
    parser.add_argument("--recipe", default="pha-90m.text")
    parser.add_argument("--processes", default="1,2,4", help="how many, with commas (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of each run (%(default)s)")
    parser.add_argument("--name", default="data-parallel", help="of the file (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    options, settings = parser.parse_known_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    from pha.utils.files import write_json
    from pha.utils.hardware import default_device, provenance

    words = [options.recipe, "--data", options.data]
    words += [f"--{name}={value}" for name, value in SETTINGS.items()]
    words += [f"--run.steps={options.steps}", *settings]
    found = [compare(words, int(number)) for number in options.processes.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "recipe": options.recipe,
        "settings": SETTINGS | {"run.steps": options.steps},
        "changes": settings,
        "cores": os.cpu_count(),
        "runs": found,
        "provenance": provenance(default_device(), "fp32"),
    }
    write_json(options.out / f"{options.name}.json", record)
    print(f"{'processes':>9} {'':>8} {'memory, MB':>10} {'sent, MB':>9} {'seconds':>8}")
    for each in found:
        for kind in ("planned", "measured"):
            size, sent, took = (each[kind][key] for key in ("memory", "sent", "seconds"))
            row = f"{each['processes']:>9} {kind:>8} {size / 1e6:>10.0f} {sent / 1e6:>9.1f}"
            print(f"{row} {took:>8.3f}")


if __name__ == "__main__":
    main()
