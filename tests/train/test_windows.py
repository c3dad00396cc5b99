"""Windows of attention that change from step to step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pha.loading import load_model
from pha.runs import RunFolder
from pha.train.models import initial_model
from pha.train.recipes import as_words, load_recipe
from pha.train.windows import window_at
from pha.utils.errors import PHAError, TrainingInterruptedError
from tests.train.conftest import Train
from tests.train.test_runs import assert_same_weights, stop_after, timeless


def test_a_window_is_a_function_of_seed_and_step() -> None:
    odds = {"16": 0.25, "64": 0.5, "full": 0.25}
    drawn = [window_at(odds, 1, step) for step in range(2000)]
    assert drawn == [window_at(odds, 1, step) for step in range(2000)]
    assert drawn != [window_at(odds, 2, step) for step in range(2000)]
    for window, share in ((16, 0.25), (64, 0.5), (None, 0.25)):
        assert abs(drawn.count(window) / 2000 - share) < 0.05
    schedule: list[list[int | str]] = [[0, 16], [3, 64], [5, "full"]]
    assert [window_at(schedule, 0, step) for step in range(6)] == [16, 16, 16, 64, 64, None]


def test_a_schedule_of_one_window_trains_in_it(train_small: Train, tmp_path: Path) -> None:
    results = [
        train_small(name, run__steps=2, run__evaluate_tokens=50, run__sample_tokens=0, **settings)
        for name, settings in (
            ("schedule", {"run__windows": "[[0, 4]]"}),
            ("model", {"model__attention_window": 4}),
        )
    ]
    schedule, model = (RunFolder(tmp_path / name) for name in ("schedule", "model"))
    assert_same_weights(schedule.checkpoint(2), model.checkpoint(2))
    # Evaluations are in the window of the model: none.
    assert results[0].evaluations[0].loss != results[1].evaluations[0].loss
    assert load_model(tmp_path / "schedule").pha.config.attention_window is None


@pytest.mark.slow
def test_a_run_goes_on_with_the_windows_that_it_would_have_had(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = {"run__windows": "{4: 0.5, full: 0.5}"}
    train_small("whole", **windows)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(TrainingInterruptedError):
            train_small("cut", **windows)
    train_small("cut", **windows)
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert_same_weights(whole.checkpoint(8), cut.checkpoint(8))
    assert timeless(whole) == timeless(cut)


def test_the_model_at_the_start_is_made_again(train_small: Train, tmp_path: Path) -> None:
    train_small(optimizer__learning_rate=1e-12, run__steps=1, run__seed=5, run__sample_tokens=0)
    run = RunFolder(tmp_path / "run")
    start, trained = initial_model(run), load_model(run.path).pha
    assert start is not None
    for (name, x), y in zip(start.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9, msg=name)
    assert initial_model(None) is None


def test_settings_are_the_same_however_they_come() -> None:
    settings = {"run.windows": {16: 0.5, "full": 0.5}}
    for way in (settings, as_words(settings), ["--run.windows", "{16: 0.5, full: 0.5}"]):
        config = load_recipe("pha-tiny.stdlib", way)
        assert config.run.windows == {"16": 0.5, "full": 0.5}


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ("{16: 0.5}", "odds of windows that sum to 1"),
        ("{16: .nan, full: 0.5}", "odds of windows that sum to 1"),
        ("{half: 1.0}", "a window is at least 2, or full"),
        ("[[0, 1]]", "a window is at least 2, or full"),
        ("[[5, 16]]", "steps are whole numbers that grow from 0"),
        ("[[0, 16], [0, 32]]", "steps are whole numbers"),
        ("[[0, 16, 3]]", "pairs of step and window"),
        ("[]", "pairs of step and window"),
    ],
)
def test_mistakes_are_refused(windows: str, words: str) -> None:
    with pytest.raises(PHAError, match=words):
        load_recipe("pha-tiny.stdlib", ["--run.windows", windows])
    with pytest.raises(PHAError, match=r"run\.windows is of our attention"):
        load_recipe("hf:gpt2-tiny.stdlib", ["--run.windows", "[[0, 16]]"])
