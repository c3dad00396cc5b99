"""Synthetic run folders: small, deterministic, with everything that a page can show."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from pha.report.page import write_report

STEPS = 400
TOKENS_PER_STEP = 12288
MakeRun = Callable[..., Path]
Change = Callable[[dict[str, Any]], object]


def train_records(floor: float, speed: float, steps: int) -> list[dict[str, Any]]:
    noise = random.Random(f"{floor} {speed}")
    return [
        {
            "kind": "train",
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "loss": loss_at(floor, step) + noise.gauss(0, 0.06),
            "learning_rate": 2e-3,
            "grad_norm": 0.8,
            "tokens_per_second": speed,
            "utilisation": 0.31,
            "seconds": step * TOKENS_PER_STEP / speed,
        }
        for step in range(1, steps + 1)
    ]


def loss_at(floor: float, step: int) -> float:
    return floor + 4.6 * math.exp(-step / 43) + 0.6 * 0.994**step


def eval_records(floor: float, steps: int) -> list[dict[str, Any]]:
    return [
        {
            "kind": "eval",
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "split": "validation",
            **scores(loss_at(floor + 0.02, step)),
            "seconds": 2.5,
        }
        for step in range(0, steps + 1, 20)
    ]


def scores(loss: float) -> dict[str, float]:
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "word_perplexity": math.exp(1.62 * loss),
        "byte_perplexity": math.exp(loss / 3.1),
        "bits_per_byte": loss / 3.1 / math.log(2),
        "accuracy": 0.9 / (1 + loss / 3),
    }


def mixing_layers(branches: list[str], layers: int, progress: float) -> list[dict[str, Any]]:
    found = []
    for layer in range(layers):
        bend = math.cos(math.pi * (2 * layer / max(layers - 1, 1) - 1))
        raw = {
            branch: 1 + progress * (0.5 - 0.4 * index) * (1 if index else 1 - bend)
            for index, branch in enumerate(branches)
        }
        gains = {branch: value**1.5 for branch, value in raw.items()}
        found.append(
            {
                "weights": {b: v / sum(raw.values()) for b, v in raw.items()},
                "effective": {b: v / sum(gains.values()) for b, v in gains.items()},
            }
        )
    return found


def result_of(name: str, floor: float, speed: float) -> dict[str, Any]:
    test_loss = floor + 0.11
    return {
        "name": name,
        "recipe": f"{name}.stdlib",
        "seed": 1234,
        "steps": STEPS,
        "tokens_seen": STEPS * TOKENS_PER_STEP,
        "seconds": STEPS * TOKENS_PER_STEP / speed,
        "tokens_per_second": speed,
        "peak_memory_bytes": 1_731_000_000,
        "utilisation": 0.312,
        "matmul_flops": 2e11,
        "best_validation_perplexity": 19.5,
        "chosen_step": STEPS,
        "model": {
            "preset": name,
            "parameters": {
                "total": 3_104_256,
                "embedding": 786_432,
                "non_embedding": 2_317_824,
                "components": {"gss": 983_040, "attention": 368_640, "primary_ffn": 966_144},
            },
        },
        "evaluations": [
            {
                "split": "test",
                **scores(test_loss),
                "tokens": 286_221,
                "words": 245_569,
                "bytes": 1_290_590,
                "seconds": 31.2,
                "protocol": {
                    "sequence_length": 256,
                    "stride": 256,
                    "windows": "non-overlapping",
                    "tokens_scored": 286_220,
                    "data_sha256": "3f0a" * 16,
                },
            }
        ],
        "samples": [
            {
                "prompt": "def read(path):\n",
                "text": f'    """Read {name}."""\n\twith open(path) as file:\n        return file',
                "temperature": 0.8,
                "top_p": 0.95,
                "seed": 7,
            },
        ],
        "data": {
            "source": "stdlib",
            "description": "source text of the Python standard library",
            "sha256": "3f0a" * 16,
            "tokenizer": "byte-level BPE, 4096",
            "tokenizer_sha256": "9bc1" * 16,
            "vocab_size": 4096,
            "counts": {"train": {"tokens": 9_120_331}, "test": {"tokens": 286_221}},
        },
        "provenance": {
            "pha": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.12.4",
            "git_commit": "8d1f6a0c7e2b4f59a3d0c1e2f3a4b5c6d7e8f901",
            "git_dirty": False,
            "device": "cpu",
            "cpu": "A processor with two cores",
            "threads": 2,
            "precision": "bf16",
            "date": "2026-07-01T12:00:00+00:00",
            "command": f"pha train {name}.stdlib --run.seed 1234 --run.name {name}",
        },
    }


def config_of(name: str, layers: int) -> dict[str, Any]:
    return {
        "model": {"preset": name, "hidden_size": 192, "layers": layers},
        "data": {"source": "stdlib", "sequence_length": 256},
        "optimizer": {"learning_rate": 0.002, "betas": [0.9, 0.95]},
        "schedule": {"kind": "cosine", "warmup_steps": 33},
        "run": {"steps": STEPS, "seed": 1234},
        "recipe": f"{name}.stdlib",
    }


def build_run(
    root: Path,
    name: str,
    floor: float = 2.9,
    speed: float = 9120.0,
    branches: tuple[str, ...] = ("gss", "attention", "aux_ffn"),
    layers: int = 4,
    finished: bool = True,
    steps: int = STEPS,
    metrics: bool = True,
    change: Change = lambda result: None,
) -> Path:
    """Write a run folder; `change` edits its result, a run without one is unfinished."""
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    config = yaml.safe_dump(config_of(name, layers), sort_keys=False)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    if metrics:
        records = train_records(floor, speed, steps) + eval_records(floor, steps)
        for step in range(0, steps + 1, 40):
            mix = mixing_layers(list(branches), layers, step / STEPS)
            tokens = step * TOKENS_PER_STEP
            records.append({"kind": "mixing", "step": step, "tokens": tokens, "layers": mix})
        records.sort(key=lambda record: record["step"])
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if finished:
        result = result_of(name, floor, speed)
        result["mixing"] = mixing_layers(list(branches), layers, 1.0)
        change(result)
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return partial(build_run, tmp_path)


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A hybrid and its attention-only twin, with everything that a run has."""
    root = tmp_path_factory.mktemp("two")
    twin = build_run(root, "twin", 3.0, 7540.0, branches=("attention",), layers=10)
    return [build_run(root, "pha"), twin]


@pytest.fixture(scope="session")
def two_page(two_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(two_runs, out).read_text(encoding="utf-8")
