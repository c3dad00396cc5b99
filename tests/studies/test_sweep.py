"""Grids of runs: what they train, skip, survive and say."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pha.cli import main
from pha.data import TokenStore
from pha.runs import RunFolder
from pha.studies.jobs import Job, run_jobs
from pha.studies.sweep import make_points, parse_axis, run_sweep, table_cells
from pha.utils.errors import PHAError
from tests.train.conftest import arguments


def overrides(store: TokenStore, **changes: Any) -> list[str]:
    words = arguments(store, run__sample_tokens=0, **changes)
    return [f"{key}={value}" for key, value in zip(words[::2], words[1::2], strict=True)]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.learning_rate=1e-3,3e-3", ("1e-3", "3e-3")),
        ("run.seed=4", ("4",)),
        ("model.preset=pha-tiny, attention-only-tiny", ("pha-tiny", "attention-only-tiny")),
        ("model.branches=[gss, aux_ffn],[gss]", ("[gss, aux_ffn]", "[gss]")),
        ("run.deterministic=true,false", ("true", "false")),
    ],
)
def test_axes_are_read(text: str, values: tuple[str, ...]) -> None:
    axis = parse_axis(text)
    assert axis.key == text.split("=")[0]
    assert axis.values == values


@pytest.mark.parametrize("text", ["learning_rate=1", "run.seed", "run.seed=", "run.seed=[1", "=1"])
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(PHAError, match="is not SECTION"):
        parse_axis(text)


def test_points_are_all_combinations_with_a_run_for_each_seed() -> None:
    axes = [parse_axis("a.x=1,2"), parse_axis("b.y=p/q,r")]
    points = make_points("recipe", axes, [0, 3], Path("out"), ["--c.z=5"])
    assert [tuple(point.settings.values()) for point in points] == [
        ("1", "p/q"),
        ("1", "r"),
        ("2", "p/q"),
        ("2", "r"),
    ]
    first = points[0].jobs[1]
    assert first.overrides == ("--c.z=5", "--a.x=1", "--b.y=p/q", "--run.seed=3")
    assert first.out == Path("out") / "x=1-y=p_q" / "seed-3"


def test_a_sweep_compares_reuses_and_records_what_diverged(
    store: TokenStore, tmp_path: Path
) -> None:
    axes = [parse_axis("optimizer.learning_rate=1e-3,1e-2,1e30")]
    settings = (
        "pha-tiny.text",
        axes,
        [0, 1],
        tmp_path / "out",
        overrides(store, run__keep_best=2, run__average_best=2),
    )
    content = run_sweep(*settings, quiet(), parallel=2)
    assert content == json.loads((tmp_path / "out" / "sweep.json").read_text())
    slow, fast, diverged = content["points"]
    for point in (slow, fast):
        results = [RunFolder(Path(run["run"])).read_result() for run in point["runs"]]
        assert [result.seed for result in results] == [0, 1]
        perplexities = [result.evaluations[0].perplexity for result in results]
        assert len(set(perplexities)) == 2
        assert point["measures"]["test"]["mean"] == pytest.approx(sum(perplexities) / 2)
        assert point["measures"]["test"]["n"] == 2
        averages = [result.candidates[1].evaluation.perplexity for result in results]
        assert point["measures"]["average"]["mean"] == pytest.approx(sum(averages) / 2)
    means = [point["measures"]["validation"]["mean"] for point in (slow, fast)]
    best = ("1e-3", "1e-2")[means.index(min(means))]
    assert content["best"] == {"optimizer.learning_rate": best}
    assert diverged["diverged"] == 2
    assert diverged["measures"] == {}
    assert all(run["status"] == "diverged" and run["step"] >= 1 for run in diverged["runs"])
    headings, cells = table_cells(content)
    assert headings[0] == "learning_rate"
    assert cells[2][-1] == "2"
    for suffix in ("md", "svg", "png"):
        assert (tmp_path / "out" / f"sweep.{suffix}").stat().st_size > 100

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    again = run_sweep(*settings, quiet())
    assert again["points"] == content["points"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps

    other = make_points(
        "pha-tiny.text", axes, [0], tmp_path / "out", overrides(store, run__steps=9)
    )
    with pytest.raises(PHAError, match="choose another"):
        run_jobs(other[0].jobs, quiet())


def test_a_bad_value_is_found_before_anything_is_trained(store: TokenStore, tmp_path: Path) -> None:
    good = Job("pha-tiny.text", tmp_path / "good", tuple(overrides(store)))
    bad = Job("pha-tiny.text", tmp_path / "bad", (*overrides(store), "--run.seed=-1"))
    with pytest.raises(PHAError, match=r"run\.seed is -1"):
        run_jobs([good, bad], quiet())
    assert not (tmp_path / "good").exists()
    with pytest.raises(PHAError, match="given twice"):
        run_sweep("pha-tiny.text", [parse_axis("run.steps=4,4")], [0], tmp_path, [], quiet())


def test_a_training_that_fails_is_named(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").touch()  # in the way of the run
    job = Job("pha-tiny.text", tmp_path / "out", tuple(overrides(store)))
    with pytest.raises(PHAError, match=r"failed with exit code 1; see .*out\.log"):
        run_jobs([job], quiet(), parallel=2)


def test_the_command_plans_and_refuses(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "pha-tiny.text", "--out", str(tmp_path / "o"), "--seeds", "2", "--dry-run"]
    main([*words, "--json", "--over", "schedule.floor=0.0,0.1", *overrides(store)])
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["runs"]) == 4
    assert plan["total"]["tokens"] == 4 * 8 * 4 * 32
    assert not (tmp_path / "o").exists()
    for bad in ("0", "x", "-3", "1,-1"):
        with pytest.raises(SystemExit) as stop:
            main([*words[:-2], bad])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
