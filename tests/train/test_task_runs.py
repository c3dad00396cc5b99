"""Runs on tasks: the same loop, loss and accuracy on the answers alone."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pha.cli import main
from pha.evals.generation import Sampling, generate
from pha.evals.tasks import evaluate_task
from pha.loading import load_model
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.report.page import write_report
from pha.results import RunResult
from pha.runs import RunFolder
from pha.sharing import export_model
from pha.tasks import IGNORE, make_task
from pha.tasks.sampler import TaskSampler
from pha.tasks.testing import make_tests
from pha.train.batches import BatchFeed
from pha.train.recipes import as_words, load_recipe
from pha.train.run import run_training
from pha.utils.errors import PHAError, TrainingInterruptedError
from pha.utils.progress import make_console
from tests.train.conftest import SMALL
from tests.train.test_runs import assert_same_weights, stop_after, timeless, weights

TESTS = {
    "4": {"pairs": [4], "length": 16, "rows": 40},
    "8": {"pairs": [8], "length": 32, "rows": 8},
}
OPTIONS = {"keys": 16, "values": 8, "noise": 4, "pairs": [2, 4], "odds": None}
CHANGES = {k: v for k, v in SMALL.items() if k != "model.preset"} | {
    "data.task_options": OPTIONS,
    "data.tests": TESTS,
    "run.steps": 4,
    "run.evaluate_every": 2,
    "run.sample_tokens": 0,
}

Train = Callable[..., RunResult]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    def run(name: str, recipe: str = "pha-tiny.mqar", **changes: Any) -> RunResult:
        settings = CHANGES | {key.replace("__", "."): value for key, value in changes.items()}
        if recipe.startswith("hf:"):
            settings = {k: v for k, v in settings.items() if not k.startswith("model.")}
        result = run_training(
            load_recipe(recipe, settings), tmp_path / name, make_console(quiet=True)
        )
        assert result is not None
        return result

    return run


def test_a_run_says_what_it_came_to(train: Train, tmp_path: Path) -> None:
    result = train("run", run__sample_tokens=4)
    run = RunFolder(tmp_path / "run")
    assert [each.split for each in result.evaluations] == ["4", "8"]
    first, second = result.evaluations
    assert first.tokens == 40 * 4
    assert second.tokens == 8 * 8
    assert sum(part.answers for part in first.parts.values()) == first.tokens
    assert math.isnan(first.word_perplexity)
    assert first.perplexity == pytest.approx(math.exp(first.loss))
    assert result.solved_step is None
    assert len(result.samples) == 2
    content = json.loads(run.result.read_text())
    assert content["evaluations"][0]["word_perplexity"] is None
    assert run.read_result().evaluations[0].parts == first.parts
    assert [r.split for r in run.read_metrics().eval] == ["validation"] * 2
    loaded = load_model(run.path)
    [made] = generate(loaded, ["k1 v2 k3"], Sampling(3))
    assert len(made.text.split()) == 3
    write_report([run.path], tmp_path / "report.html")
    export_model(run.path, tmp_path / "shared")
    assert "next-token accuracy" in (tmp_path / "shared" / "README.md").read_text()


def test_stopped_and_continued_equals_uninterrupted(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("whole", run__micro_batch=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(TrainingInterruptedError):
            train("cut", run__micro_batch=3)
    train("cut", run__micro_batch=3)
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert_same_weights(whole.checkpoint(4), cut.checkpoint(4))
    assert_same_weights(whole.model, cut.model)
    assert str(timeless(whole)) == str(timeless(cut))  # with what is not a number


def test_accumulation_weighs_answers_and_not_micro_batches(train: Train, tmp_path: Path) -> None:
    # Of flip-flops the number of answers differs from row to row.
    options: dict[str, Any] = {"data__task_options": {}, "model__dropout": 0.0}
    options["data__tests"] = {"test": {"rows": 8}}
    for micro in (4, 1, 3):
        train(str(micro), "pha-tiny.flip-flop", **options, run__micro_batch=micro)
    first, *others = (weights(tmp_path / name / "checkpoints" / "step-4") for name in "413")
    for other in others:
        for key, value in first.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(train: Train, tmp_path: Path) -> None:
    settings = {"data.task_options": {}, "data.tests": {"x": {"rows": 40}}, "run.micro_batch": 2}
    train("one", "pha-tiny.flip-flop", **{k.replace(".", "__"): v for k, v in settings.items()})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "pha", "train", "pha-tiny.flip-flop", "--out", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = as_words(CHANGES | settings)
    subprocess.run([*command, *words], env=environment, check=True, timeout=300)
    one, two = (RunFolder(tmp_path / name) for name in ("one", "two"))
    a, b = weights(one.checkpoint(4)), weights(two.checkpoint(4))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=2e-5)
    for x, y in zip(one.read_metrics().eval, two.read_metrics().eval, strict=True):
        assert x.loss == pytest.approx(y.loss, rel=1e-5)


@pytest.mark.parametrize("recipe", ["hf:gpt2-tiny.mqar", "mamba2-tiny.mqar"])
def test_other_models_answer_too(train: Train, recipe: str) -> None:
    options = {"mamba2": {"state_size": 8, "head_size": 16}}
    changes = {} if recipe.startswith("hf") else {"model__branch_options": options}
    foreign = {"transformers__set": {"n_embd": 32, "n_layer": 1}} if not changes else {}
    tests = TESTS | {"longer": {"pairs": [8], "length": 64, "rows": 8, "gap": [4, 9]}}
    result = train("run", recipe, run__steps=2, data__tests=tests, **changes, **foreign)
    assert [each.tokens for each in result.evaluations] == [160, 64, 64]


def small_model() -> PHAForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    return PHAForCausalLM(PHAConfig.from_preset("pha-tiny", vocab_size=28, state_size=32, **shape))


def test_only_labelled_states_meet_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = TaskSampler(make_task("mqar", OPTIONS), 32, 4, seed=0)
    found = []
    original = PHAForCausalLM._summed_loss
    for gather in (True, False):
        with BatchFeed(sampler, [(0, 4)], torch.device("cpu"), gather=gather) as feed:
            inputs = feed.get(3, 0)
        assert inputs.pop("labels") == int((inputs["shift_labels"] != IGNORE).sum())
        model = small_model().train()
        rows: list[int] = []
        with monkeypatch.context() as patch:

            def counted(self: Any, x: torch.Tensor, *rest: Any, seen: Any = rows) -> Any:
                seen.append(len(x))
                return original(self, x, *rest)

            patch.setattr(PHAForCausalLM, "_summed_loss", counted)
            loss = model(**inputs).loss
        loss.backward()
        found.append((rows, loss, [p.grad for p in model.parameters()]))
    (few, loss, grads), (all_rows, other, others) = found
    assert 4 * few[0] == all_rows[0]
    torch.testing.assert_close(loss, other)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_accuracy_counts_what_a_plain_reading_does() -> None:
    model = small_model()
    [test] = make_tests("mqar", OPTIONS, {"x": {"gap": [0, 20], "rows": 40}}, 40)
    result = evaluate_task(model, test, "x")
    nats, hits, near = [], [], []
    for drawn, _ in test.blocks(for_validation=False):
        labels = torch.from_numpy(drawn.labels)
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(drawn.tokens)).logits
        asked = labels != IGNORE
        nats.append(
            torch.nn.functional.cross_entropy(logits[asked], labels[asked], reduction="none")
        )
        hits.append(logits[asked].argmax(-1) == labels[asked])
        assert drawn.distances is not None
        distances = torch.from_numpy(drawn.distances)[asked]
        near.append((distances >= 8) & (distances < 16))
    loss, right, octave = torch.cat(nats), torch.cat(hits), torch.cat(near)
    assert result.loss == pytest.approx(float(loss.mean()), rel=1e-5)
    assert result.accuracy == pytest.approx(float(right.float().mean()))
    assert result.parts["8"].answers == int(octave.sum()) > 0
    assert result.parts["8"].loss == pytest.approx(float(loss[octave].mean()), rel=1e-5)


def test_excess_of_gist_is_over_bayes() -> None:
    [test] = make_tests("gist", {"size": 28}, {"x": {"rows": 4}}, 32)
    result = evaluate_task(small_model(), test, "x")
    drawn, _ = next(test.blocks(for_validation=False))
    best = test.task.best(drawn)
    assert best is not None
    assert result.best == pytest.approx(float(best.mean()))
    assert result.loss > float(best.mean())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pha-tiny.mqra"], "there is no recipe 'pha-tiny.mqra'; did you mean .*mqar"),
        (["pha-tiny.mqar", "--data.task_options", "{keys: 99, pairs: [99]}"], "99 pairs"),
        (["pha-tiny.mqar", "--data.tests", "{x: {lenght: 4}}"], "x: task mqar has no option"),
        (["pha-tiny.mqar", "--data.packed_documents", "true"], "stand apart already"),
        (["pha-tiny.mqar", "--run.epochs", "2"], "a task has no epochs"),
        (["pha-tiny.mqar", "--data.source", "stdlib"], "belong to a task"),
        (["pha-tiny.mqar", "--data.tests", "{x: {noise: 4}}"], "has other tokens"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *words, "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error)
    assert not (tmp_path / "run").exists()


def test_other_sequences_are_not_continued(train: Train, tmp_path: Path) -> None:
    train("run")
    with pytest.raises(PHAError, match=r"data\.task_options"):
        train("run", data__task_options=OPTIONS | {"odds": [2, 1]})
