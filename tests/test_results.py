"""The records of a run: written, read back, older files, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pha.results import VERSION, RunResult
from pha.runs import RunFolder
from pha.utils.errors import PHAError

OLD = sorted((Path(__file__).parents[1] / "results").glob("*/*/result.json"))
TRAIN = {"kind": "train", "step": 1, "tokens": 8, "loss": 2.0, "learning_rate": 1e-3}
TRAIN |= {"grad_norm": 1.0, "tokens_per_second": 9.0, "utilisation": 0.5, "seconds": 1}
MIXING = {"kind": "mixing", "step": 0, "tokens": 0, "layers": [{"weights": {}, "effective": {}}]}


def holds(new: Any, old: Any) -> bool:
    """Whether all that stands in an older record stands in a newer one, which may say more."""
    if isinstance(old, dict):
        return old.keys() <= new.keys() and all(holds(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return len(old) == len(new) and all(map(holds, new, old))
    return bool(new == old)


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.parent.name)
def test_files_without_a_version_are_read_whole(path: Path, tmp_path: Path) -> None:
    result = RunResult.read(path)
    assert holds(result.to_dict(), json.loads(path.read_text()))
    result.write(tmp_path / "result.json")
    assert RunResult.read(tmp_path / "result.json") == result
    assert json.loads((tmp_path / "result.json").read_text())["version"] == VERSION
    metrics = RunFolder(path.parent).read_metrics()
    assert metrics.train[-1].step == metrics.eval[-1].step == result.steps
    assert metrics.mixing[-1].step == result.steps


def test_a_value_that_is_no_number_is_null_and_read_as_none(tmp_path: Path) -> None:
    result = RunResult.read(OLD[0])
    evaluation = replace(result.evaluations[0], word_perplexity=float("inf"))
    replace(result, evaluations=[evaluation]).write(tmp_path / "result.json")
    assert "Infinity" not in (tmp_path / "result.json").read_text()
    [found] = RunResult.read(tmp_path / "result.json").evaluations
    assert math.isnan(found.word_perplexity)
    assert replace(found, word_perplexity=evaluation.word_perplexity) == evaluation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": VERSION + 1}, f"written by a newer pha, format {VERSION + 1}"),
        ({"steps": "many"}, "steps is 'many', not of type int"),
        ({"seconds": True}, "seconds is True, not of type float"),
        ({"mixing": [{"weights": {"gss": None}}]}, "mixing[0].effective is missing"),
        ({"model": []}, "model is [], not of type object"),
        ({"model": {"preset": "x"}}, "model.parameters is missing"),
    ],
)
def test_a_bad_result_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = json.loads(OLD[0].read_text()) | change
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(PHAError) as caught:
        RunFolder(tmp_path).read_result()
    assert message in str(caught.value)
    assert str(tmp_path / "result.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def write_lines(folder: Path, *lines: Any, end: str = "") -> RunFolder:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + end, encoding="utf-8")
    return RunFolder(folder)


def test_only_a_cut_last_line_is_skipped(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).read_metrics().train == []
    later = {"kind": "of another version", "step": 1}
    metrics = write_lines(tmp_path, MIXING, TRAIN, later, end='{"kind": "tr').read_metrics()
    assert (len(metrics.train), len(metrics.eval), len(metrics.mixing)) == (1, 0, 1)
    assert metrics.train[0].data_wait is None
    run = write_lines(tmp_path, MIXING, end='{"kind": "tr\n{}\n')
    with pytest.raises(PHAError, match="line 2, is not a JSON object"):
        run.read_metrics()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (3, "line 2, is not a JSON object"),
        ({k: v for k, v in TRAIN.items() if k != "loss"}, "line 2: loss is missing"),
        (TRAIN | {"loss": "2"}, "line 2: loss is '2', not of type float"),
    ],
)
def test_a_bad_record_is_refused_in_one_line(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(PHAError) as caught:
        write_lines(tmp_path, TRAIN, line).read_metrics()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(PHAError, match="line 1, is not a JSON object"):
        RunFolder(tmp_path).read_metrics()
