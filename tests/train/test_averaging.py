"""Keeping the best, averaging them, and choosing between the best and the average."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pha.data import TokenStore
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.loading import load_model
from pha.runs import RunFolder
from pha.train.averaging import average_models, average_weights
from pha.train.checkpoint import Progress
from pha.train.trainer import Trainer
from pha.utils.errors import PHAError, TrainingInterruptedError
from pha.utils.files import write_json
from pha.utils.formats import read_json
from tests.train.conftest import Train

AVERAGING = {
    "run__steps": 12,
    "run__evaluate_every": 2,
    "run__keep_best": 4,
    "run__average_best": 3,
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_progress_ranks_evaluations_and_keeps_the_best() -> None:
    progress = Progress()
    ranks = []
    for step, perplexity in enumerate((9.0, 7.0, 8.0, 7.0, 10.0, 6.0), start=1):
        progress.step = step
        ranks.append(progress.rank(perplexity, keep=3))
    assert ranks == [0, 0, 1, 1, None, 0]
    assert progress.best == [(6.0, 6), (7.0, 2), (7.0, 4)]


def test_the_average_is_the_mean_of_the_best_and_the_better_one_is_chosen(
    train_small: Train, store: TokenStore, tmp_path: Path
) -> None:
    result = train_small(**AVERAGING)
    run = RunFolder(tmp_path / "run")
    evaluations = sorted((r.perplexity, r.step) for r in run.read_metrics().eval)
    # and what the checkpoint before the last one would need.
    assert {step for _, step in evaluations[:4]} <= set(run.best_steps())
    assert len(run.best_steps()) <= 5
    best, average = result.candidates
    assert (best.name, average.name) == ("best checkpoint", "average")
    assert best.steps == [evaluations[0][1]]
    assert average.steps == [step for _, step in evaluations[:3]]

    parts = [weights(run.best_model(step)) for step in average.steps]
    for name, value in weights(run.averaged).items():
        mean = torch.stack([part[name].double() for part in parts]).mean(0).float()
        torch.testing.assert_close(value, mean, rtol=0, atol=0)

    scores = {}
    for candidate, folder in ((best, run.best_model(best.steps[0])), (average, run.averaged)):
        model = load_model(folder).model
        for split in ("validation", "test"):
            score = evaluate(model, store, split, Protocol(32, 32))
            scores[candidate.name, split] = score.perplexity
        assert candidate.validation_perplexity == scores[candidate.name, "validation"]
        assert candidate.evaluation.perplexity == scores[candidate.name, "test"]
    chosen = min(("best checkpoint", "average"), key=lambda name: scores[name, "validation"])
    assert result.chosen == chosen
    assert result.evaluations[0].perplexity == scores[chosen, "test"]
    expected = run.averaged if chosen == "average" else run.best_model(best.steps[0])
    for name, value in weights(run.model).items():
        assert torch.equal(value, weights(expected)[name])


def test_the_average_is_passed_over_where_it_is_worse(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(folders: list[Path], out: Path) -> None:
        average_models(folders, out)
        spoilt = {name: torch.randn_like(value) for name, value in weights(out).items()}
        save_file(spoilt, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("pha.train.finish.average_models", spoil)
    result = train_small(**AVERAGING)
    run = RunFolder(tmp_path / "run")
    best, average = result.candidates
    assert average.validation_perplexity > best.validation_perplexity
    assert result.chosen == "best checkpoint"
    assert result.chosen_step == best.steps[0]
    for name, value in weights(run.model).items():
        assert torch.equal(value, weights(run.best_model(best.steps[0]))[name])


def test_kept_weights_survive_an_interruption(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_small("whole", **AVERAGING)
    step = Trainer._step

    def stop_at_seven(self: Trainer, number: int, rate: float) -> Any:
        self.stop_requested = number + 1 == 7
        return step(self, number, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stop_at_seven)
        with pytest.raises(TrainingInterruptedError):
            train_small("cut", **AVERAGING)
    train_small("cut", **AVERAGING)
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert whole.best_steps() == cut.best_steps()
    for folder in ("averaged", "model"):
        expected = weights(whole.path / folder)
        for name, value in weights(cut.path / folder).items():
            assert torch.equal(value, expected[name])


def test_what_a_checkpoint_needs_outlives_its_eviction(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between an eviction and the next checkpoint, the run still has its old best."""
    changes = AVERAGING | {"run__keep_best": 2, "run__average_best": 2, "run__checkpoint_every": 6}
    train_small("whole", **changes)
    evaluate_ = Trainer._evaluate

    def die_at_ten(self: Trainer, *arguments: Any) -> None:
        evaluate_(self, *arguments)
        if self.progress.step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", die_at_ten)
        with pytest.raises(KeyboardInterrupt):
            train_small("cut", **changes)
    cut = RunFolder(tmp_path / "cut")
    assert cut.checkpoint_steps() == [6]
    assert {4, 6} <= set(cut.best_steps())
    train_small("cut", **changes)
    expected = weights(tmp_path / "whole" / "averaged")
    for name, value in weights(cut.averaged).items():
        assert torch.equal(value, expected[name])


def test_averaging_refuses_what_does_not_fit(train_small: Train, tmp_path: Path) -> None:
    train_small("a", run__steps=2)
    train_small("b", run__steps=2, model__state_size=48)
    a, b = tmp_path / "a" / "model", tmp_path / "b" / "model"
    with pytest.raises(PHAError, match=r"differ in config\.json"):
        average_models([a, b], tmp_path / "mean")
    with pytest.raises(PHAError, match="differ in the shape of"):
        average_weights([a, b])
    # Saved by two versions of transformers, a run that was interrupted for that.
    shutil.copytree(a, tmp_path / "later")
    config = read_json(a / "config.json") | {"transformers_version": "99.0", "dtype": "bfloat16"}
    write_json(tmp_path / "later" / "config.json", config)
    average_models([a, tmp_path / "later"], tmp_path / "two")
    assert read_json(tmp_path / "two" / "config.json")["hidden_size"] == config["hidden_size"]
    with pytest.raises(PHAError, match=r"config\.json does not exist"):
        average_models([tmp_path / "absent"], tmp_path / "mean")
    write_json(tmp_path / "later" / "config.json", [])
    with pytest.raises(PHAError, match=r"config\.json is damaged"):
        average_models([tmp_path / "later", a], tmp_path / "mean")
    data = (b / "model.safetensors").read_bytes()
    (b / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(PHAError, match="cannot be read"):
        average_weights([b])
    assert not (tmp_path / "mean").exists()
