"""A run small enough to train in a second or two."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from pha.data import TokenStore
from pha.results import RunResult
from pha.train.config import TrainConfig
from pha.train.recipes import load_recipe
from pha.train.run import run_training

SMALL = {
    "model.preset": "pha-tiny",
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.state_size": 32,
    "model.head_dim": 8,
    "model.dropout": 0.1,
    "data.sequence_length": 32,
    "schedule.warmup_steps": 2,
    "run.steps": 8,
    "run.global_batch": 4,
    "run.precision": "fp32",
    "run.evaluate_every": 4,
    "run.evaluate_tokens": 500,
    "run.log_every": 1,
    "run.sample_tokens": 4,
}

Train = Callable[..., RunResult]
"""(name="run", resume="auto", console=None, **changes): train it, changed, in the folder `name`."""


def arguments(store: TokenStore, **changes: Any) -> list[str]:
    """Command-line overrides for a small run; dots in keys are written as double underscores."""
    values = SMALL | {"data.store": str(store.path)}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


@pytest.fixture
def small_config(store: TokenStore) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        if "epochs" in str(changes):
            changes.setdefault("run__steps", "null")
        return load_recipe("pha-tiny.text", arguments(store, **changes | _no_epochs(changes)))

    return make


def _no_epochs(changes: dict[str, Any]) -> dict[str, Any]:
    return {} if "run__epochs" in changes else {"run__epochs": "null"}


@pytest.fixture
def train_small(small_config: Callable[..., TrainConfig], tmp_path: Path) -> Train:
    def train(
        name: str = "run",
        resume: Literal["auto", "never"] = "auto",
        console: Console | None = None,
        **changes: Any,
    ) -> RunResult:
        console = console or Console(file=io.StringIO())
        result = run_training(small_config(**changes), tmp_path / name, console, resume)
        assert result is not None  # this is the main process
        return result

    return train
