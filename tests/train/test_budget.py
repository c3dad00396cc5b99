"""Runs as long as a time allows."""

from __future__ import annotations

import gc
import io
import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pha.cli import main
from pha.data import TokenStore
from pha.results import RunResult
from pha.runs import RunFolder
from pha.train import budget
from pha.train import run as run_module
from pha.train.config import TrainConfig
from pha.train.run import run_training
from pha.utils.errors import PHAError
from tests.cli.conftest import pha  # noqa: F401
from tests.train.conftest import arguments


@pytest.mark.parametrize(("text", "seconds"), [("20min", 1200), ("90s", 90), ("1.5h", 5400)])
def test_a_time_in_words(text: str, seconds: float) -> None:
    assert budget.read_seconds(text) == seconds


@pytest.mark.parametrize("text", ["20", "min", "0s", "-3min", "20 days"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(PHAError, match="give a time such as 20min"):
        budget.read_seconds(text)


def test_steps_fill_the_time_and_stay_once_begun(
    small_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[int] = []

    def measure(config: TrainConfig) -> tuple[float, float]:
        trials.append(config.run.steps or 0)
        return 0.1, 2.0

    monkeypatch.setattr(budget, "_measure", measure)
    config, console = small_config(), Console(file=io.StringIO())
    fitted = budget.fit_budget(config, tmp_path / "run", 60, console).run.steps
    assert fitted in (579, 580)
    assert trials[0] == 4
    assert sum(trials) * 0.1 <= 3
    with pytest.raises(PHAError, match="give a longer --budget"):
        budget.fit_budget(config, tmp_path / "run", 2, console)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run: {steps: 123}")
    trials.clear()
    assert budget.fit_budget(config, tmp_path / "run", 60, console).run.steps == 123
    assert not trials
    (tmp_path / "run" / "config.yaml").write_text("run: {steps: many}")
    with pytest.raises(PHAError, match=r"run\.steps is 'many'"):
        budget.fit_budget(config, tmp_path / "run", 60, console)


def test_a_trial_averages_and_tests_twice_where_the_run_will(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[RunResult] = []

    def train(*arguments: Any) -> None:
        result = run_training(*arguments)
        assert result is not None
        trials.append(result)

    monkeypatch.setattr(budget, "run_training", train)
    budget._measure(small_config(run__steps=4, run__keep_best=3, run__average_best=2))
    budget._measure(small_config(run__steps=4))
    assert [len(trial.candidates) for trial in trials] == [2, 1]


def test_a_trial_leaves_no_model_behind(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose memory the run's plan would count as taken, until Python looks for cycles."""
    models: list[weakref.ref[Any]] = []
    make = run_module.make_model

    def noted(config: TrainConfig) -> Any:
        models.append(weakref.ref(model := make(config)))
        return model

    monkeypatch.setattr(run_module, "make_model", noted)
    gc.collect()
    gc.disable()
    try:
        budget._measure(small_config(run__steps=4))
        assert [model() for model in models] == [None]
    finally:
        gc.enable()


def test_another_length_beside_a_budget_is_refused(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "pha-tiny.text", *arguments(store), "--budget", "1s"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "--budget says how long the run is, and so does run.steps" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_ends_near_its_time(
    pha: Callable[..., str],  # noqa: F811
    store: TokenStore,
    tmp_path: Path,
) -> None:
    settings = arguments(store, run__steps="null")
    words = ["train", "pha-tiny.text", *settings, "--budget", "40s", "--json"]
    begin = time.monotonic()
    result = json.loads(pha(*words, "--out", tmp_path / "run"))
    assert 30 < time.monotonic() - begin < 50
    last = RunFolder(tmp_path / "run").read_metrics().train[-1]
    assert last.step == result["steps"]
    assert last.learning_rate == pytest.approx(0.05 * 3e-3)
