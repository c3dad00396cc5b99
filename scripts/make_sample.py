"""Make a sample of every format that pha writes, for tests/samples: small, and never to be renewed.

    python scripts/make_sample.py tests/samples/vN

A store, and a run on it whose checkpoint is from before its end. A format that changes gets a
sample of its own beside the older ones, which must stay readable: tests/test_formats.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from rich.console import Console

from pha.data import prepare
from pha.results import RunResult
from pha.train.recipes import load_recipe
from pha.train.run import run_training

SETTINGS = {
    "model.preset": "pha-tiny",
    "model.hidden_size": 4,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "model.head_dim": 2,
    "model.state_size": 16,
    "model.auxiliary_ffn_expansion": 2.0,
    "data.store": "store",
    "data.sequence_length": 16,
    "schedule.warmup_steps": 2,
    "run.epochs": None,
    "run.steps": 12,
    "run.global_batch": 2,
    "run.precision": "fp32",
    "run.evaluate_every": 8,
    "run.log_every": 2,
    "run.sample_tokens": 4,
}


def make_text(folder: Path) -> None:
    """Three files of counting."""
    folder.mkdir()
    for name, count in (("train", 120), ("valid", 20), ("test", 20)):
        lines = (f"{i} and {3 * i + len(name)} is {4 * i + len(name)}.\n" for i in range(count))
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def main(out: Path) -> None:
    """Write `out/store` and `out/run`, with nothing in them that names this machine."""
    out.mkdir(parents=True)
    os.chdir(out)
    make_text(Path("text"))
    prepare("text", "bytes", Path("store"))
    run = Path("run")
    run_training(load_recipe("pha-tiny.text", SETTINGS), run, Console())
    shutil.rmtree("text")
    shutil.rmtree(run / "checkpoints" / "step-12")
    for name in (".lock", ".owner"):
        (run / name).unlink(missing_ok=True)
    content = RunResult.read(run / "result.json")
    kept = {"pha", "torch", "transformers", "device", "precision", "threads"}
    for name in content.provenance.keys() - kept:
        del content.provenance[name]
    content.write(run / "result.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
