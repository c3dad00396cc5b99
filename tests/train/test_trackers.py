"""What trackers are told of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pha.runs import RunFolder
from pha.train.config import TrainConfig
from pha.train.trackers import TRACKERS, require_trackers, start_trackers
from pha.utils.errors import PHAError


class Accelerator:
    """Takes note of how trackers are begun."""

    is_main_process = True

    def init_trackers(self, project: str, config: dict[str, Any], init_kwargs: Any) -> None:
        self.told = project, config, init_kwargs


def told(config: TrainConfig, run: RunFolder) -> Any:
    accelerator: Any = Accelerator()
    start_trackers(accelerator, config, run)
    return accelerator.told


def test_a_tracker_gets_every_key_and_one_run_after_a_resume(tmp_path: Path) -> None:
    config = TrainConfig(recipe="pha-tiny.text")
    config.run.trackers = ["wandb", "tensorboard"]
    run, other = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    for each in (run, other):
        each.path.mkdir()
    first, again, elsewhere = (told(config, each) for each in (run, run, other))
    assert first == again
    _, settings, options = first
    assert settings["recipe"] == "pha-tiny.text"
    assert settings["optimizer.learning_rate"] == 1e-3
    assert settings["model.branches"] == '["gss", "attention", "aux_ffn"]'
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())
    assert options["wandb"]["name"] == "a"
    assert options["wandb"]["group"] == "pha-tiny.text"
    assert options["wandb"]["resume"] == "allow"
    assert options["tensorboard"] == {}
    assert options["wandb"]["id"] != elsewhere[2]["wandb"]["id"]


def test_trackers_that_are_not_there_are_refused() -> None:
    require_trackers([])
    assert {"tensorboard", "wandb", "trackio", "mlflow"} <= set(TRACKERS)
    with pytest.raises(PHAError, match="did you mean wandb"):
        require_trackers(["wandbb"])
    with pytest.raises(PHAError, match="pip install dvclive"):
        require_trackers(["dvclive"])
