"""Reading run folders: what counts as one, what may be missing, what a resume leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pha.report.collect import collect
from pha.utils.errors import PHAError
from tests.report.conftest import MakeRun


def write_metrics(folder: Path, *losses: float) -> Path:
    """A run that has only begun, with these losses from step 1 on."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("tokens", "learning_rate", "grad_norm", "tokens_per_second", "utilisation", "seconds")
    records = [
        {"kind": "train", "step": step, "loss": loss} | dict.fromkeys(names, 1)
        for step, loss in enumerate(losses, start=1)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_no_run_is_an_error() -> None:
    with pytest.raises(PHAError, match="at least one"):
        collect([])


def test_a_folder_without_any_file_of_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PHAError, match="not a run folder") as caught:
        collect([tmp_path])
    assert "\n" not in str(caught.value)
    with pytest.raises(PHAError, match="no such folder"):
        collect([tmp_path / "absent"])


def test_the_same_folder_twice_is_an_error(make_run: MakeRun) -> None:
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
    ],
)
def test_damaged_files_are_one_clear_line(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PHAError, match=name) as caught:
        collect([tmp_path])
    assert "\n" not in str(caught.value)


def test_an_unfinished_run_says_how_far_it_came(make_run: MakeRun) -> None:
    (run,) = collect([make_run("a", finished=False, steps=200, speed=5000.0)])
    assert run.result is None
    assert run.tokens_seen == 200 * 12288
    assert run.mixing == run.metrics.mixing[-1].layers
    latest = run.latest_eval("validation")
    assert latest is not None
    assert latest.step == 200


def test_the_chosen_step_has_the_evaluation_to_show(make_run: MakeRun) -> None:
    path = make_run("a", change=lambda result: result.update(chosen_step=200))
    (run,) = collect([path])
    chosen = run.latest_eval("validation")
    assert chosen is not None
    assert chosen.step == 200


def test_divergence_is_found(tmp_path: Path) -> None:
    (run,) = collect([write_metrics(tmp_path, 5.0, float("nan"))])
    assert run.diverged_at() == 2


def test_labels_tell_runs_apart(make_run: MakeRun) -> None:
    def rename(result: dict[str, Any]) -> None:
        result["name"] = "same"

    runs = collect([make_run("a", change=rename), make_run("b", change=rename)])
    assert [run.label for run in runs] == [str(run.path) for run in runs]
