"""Reading run folders: what counts as one, what may be missing, what a resume leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pha.report.collect import collect
from pha.utils.errors import PHAError

HOSTILE: dict[str, Any] = {
    "model": None,
    "evaluations": [{"split": "test", "perplexity": "many", "loss": float("nan")}, 3],
    "mixing": [{"weights": {"gss": None}}, "layer"],
    "samples": {},
    "data": [],
    "seconds": True,
}


def write_metrics(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def train(step: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss}


def test_no_run_is_an_error():
    with pytest.raises(PHAError, match="at least one"):
        collect([])


def test_a_folder_without_any_file_of_a_run_is_an_error(tmp_path):
    with pytest.raises(PHAError, match="not a run folder") as caught:
        collect([tmp_path])
    assert "\n" not in str(caught.value)
    with pytest.raises(PHAError, match="no such folder"):
        collect([tmp_path / "absent"])


def test_the_same_folder_twice_is_an_error(make_run):
    run = make_run("a", steps=10)
    with pytest.raises(PHAError, match="given twice"):
        collect([run, run / ".." / "a"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: [1,\nb: }"),
        ("config.yaml", "- a list"),
        ("result.json", "[1]"),
        ("result.json", "{"),
        ("metrics.jsonl", "3\n4\n"),
        ("metrics.jsonl", "{broken\n{}\n"),
    ],
)
def test_damaged_files_are_one_clear_line(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PHAError, match=name) as caught:
        collect([tmp_path])
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_a_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(PHAError, match="cannot be read as text"):
        collect([tmp_path])


def test_values_of_the_wrong_type_count_as_missing(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(HOSTILE), encoding="utf-8")
    (run,) = collect([tmp_path])
    assert run.finished
    assert run.seconds is None
    assert run.parameters is None
    assert [e.scores.perplexity for e in run.evaluations] == [None]
    assert [dict(layer.weights) for layer in run.mixing] == [{}]
    assert run.samples == ()


def test_an_unfinished_run_says_how_far_it_came(make_run):
    (run,) = collect([make_run("a", finished=False, steps=200, speed=5000.0)])
    assert not run.finished
    assert run.steps == 200
    assert run.tokens_seen == 200 * 12288
    assert run.tokens_per_second == 5000.0
    assert run.seed == 1234
    assert run.recipe == "a.stdlib"
    assert run.mixing == run.mixing_history[-1].layers
    latest = run.latest_eval("validation")
    assert latest is not None
    assert latest.step == 200


def test_records_of_a_resumed_run_supersede_what_was_written_first(tmp_path):
    records = [train(10, 5.0), train(20, 4.0), train(30, 3.0), train(20, 4.5), train(25, 3.5)]
    (run,) = collect([write_metrics(tmp_path, *records)])
    assert [(p.step, p.loss) for p in run.train] == [(10, 5.0), (20, 4.5), (25, 3.5)]


def test_a_resume_supersedes_only_evaluations_of_the_same_split(tmp_path):
    def evaluation(step: int, split: str, loss: float) -> dict[str, Any]:
        return {"kind": "eval", "step": step, "split": split, "loss": loss}

    records = [evaluation(10, "validation", 3.0), evaluation(10, "test", 3.1)]
    records += [evaluation(10, "validation", 2.9)]
    (run,) = collect([write_metrics(tmp_path, *records)])
    assert [(p.split, p.scores.loss) for p in run.evals] == [("test", 3.1), ("validation", 2.9)]


def test_the_chosen_step_has_the_evaluation_to_show(make_run):
    path = make_run("a", change=lambda result: result.update(chosen_step=200))
    (run,) = collect([path])
    chosen = run.latest_eval("validation")
    assert chosen is not None
    assert chosen.step == 200


def test_divergence_is_found(tmp_path):
    (run,) = collect([write_metrics(tmp_path, train(10, 5.0), train(20, float("nan")))])
    assert run.diverged_at() == 20


def test_labels_tell_runs_apart(make_run, tmp_path):
    def rename(result: dict[str, Any]) -> None:
        result["name"] = "same"

    runs = collect([make_run("a", change=rename), make_run("b", change=rename)])
    assert [run.label for run in runs] == ["a", "b"]
    paths = [write_metrics(tmp_path / parent / "run", train(1, 2.0)) for parent in ("x", "y")]
    runs = collect(paths)
    assert [run.label for run in runs] == ["x/run", "y/run"]
