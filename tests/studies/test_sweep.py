"""Sweeps: a study on the command line, what it trains, skips, survives and says."""

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
from pha.studies.sweep import make_sweep, parse_axis
from pha.train.recipes import load_recipe, parse_overrides
from pha.utils.errors import PHAError
from tests.train.conftest import arguments


def settings(store: TokenStore, **changes: Any) -> dict[str, Any]:
    return parse_overrides(arguments(store, run__sample_tokens=0, **changes))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.learning_rate=1e-3,3e-3", {"1e-3": 0.001, "3e-3": 0.003}),
        (
            "model.preset=pha-tiny, attention-only-tiny",
            {"pha-tiny": "pha-tiny", "attention-only-tiny": "attention-only-tiny"},
        ),
        (
            "model.branches=[gss, aux_ffn],[gss]",
            {"[gss, aux_ffn]": ["gss", "aux_ffn"], "[gss]": ["gss"]},
        ),
        ("run.deterministic=true,false", {"true": True, "false": False}),
    ],
)
def test_axes_are_read(text: str, values: dict[str, Any]) -> None:
    key = text.split("=")[0]
    assert parse_axis(text) == (key, {word: {key: value} for word, value in values.items()})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(
            (text, "is not SECTION")
            for text in ("learning_rate=1", "run.steps", "run.steps=", "=1")
        ),
        ("run.steps=[1", "is not SECTION"),
        ("run.steps=many", "run.steps"),
        ("run.stepz=1", "run.stepz"),
        ("run.steps=4,4", "given twice"),
        ("run.seed=4,5", "--seeds"),
    ],
)
def test_what_is_no_axis_is_refused(text: str, said: str) -> None:
    with pytest.raises(PHAError, match=said):
        parse_axis(text)


def test_a_sweep_is_a_study_of_all_combinations() -> None:
    over = ["optimizer.learning_rate=1e-3,2e-3", "model.dropout=0,0.1"]
    study, scale = make_sweep("pha-tiny.stdlib", over, {"run.keep_best": 2, "run.average_best": 2})
    assert [variant.label for variant in study.variants] == [
        f"learning_rate {rate}, dropout {dropout}"
        for rate in ("1e-3", "2e-3")
        for dropout in ("0", "0.1")
    ]
    assert study.variants[1].set == {"optimizer.learning_rate": 1e-3, "model.dropout": 0.1}
    assert (study.axis, study.plots, scale.words) == ("learning_rate", ["settings"], scale.name)
    assert "average" in study.columns
    seeds, _ = make_sweep("pha-tiny.stdlib", [], {})
    assert [variant.label for variant in seeds.variants] == ["pha-tiny.stdlib"]
    assert "average" not in seeds.columns


@pytest.mark.slow
def test_a_sweep_compares_reuses_and_records_what_diverged(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "pha-tiny.text", "--over", "optimizer.learning_rate=1e-3,1e-2,1e15"]
    words += ["--out", str(tmp_path), *arguments(store, run__sample_tokens=0)]
    main([*words, "--jobs", "2"])
    assert "lowest validation perplexity" in " ".join(capsys.readouterr().out.split())
    content = json.loads((tmp_path / "study.json").read_text())
    *fine, lost = content["variants"]
    for row in fine:
        (seed,) = row["seeds"]
        result = RunFolder(Path(seed["run"])).read_result()
        assert row["measures"]["test"]["mean"] == result.evaluations[0].perplexity
        assert row["measures"]["bits"]["mean"] == result.evaluations[0].bits_per_byte
    means = {row["name"]: row["measures"]["validation"]["mean"] for row in fine}
    assert content["best"] == min(means, key=lambda name: means[name])
    assert [row["diverged"] for row in content["variants"]] == [0, 0, 1]
    assert lost["measures"] == {}
    assert lost["settings"]["optimizer.learning_rate"] == 1e15
    assert lost["seeds"][0]["diverged_at"] >= 1
    table = (tmp_path / "table.md").read_text()
    assert "learning_rate 1e15 diverged in 1 of 1 runs." in table
    assert "| learning_rate 1e15 | 1 |" in table
    for suffix in ("svg", "png"):
        assert (tmp_path / f"settings.{suffix}").stat().st_size > 1000

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["variants"] == content["variants"]
    assert len(stamps) == 2
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_bad_value_is_found_before_anything_is_trained(store: TokenStore, tmp_path: Path) -> None:
    good = Job("pha-tiny.text", tmp_path / "good", settings(store))
    bad = Job("pha-tiny.text", tmp_path / "bad", settings(store) | {"run.seed": -1})
    with pytest.raises(PHAError, match=r"run\.seed is -1"):
        run_jobs([good, bad], quiet())
    assert not (tmp_path / "good").exists()


def test_the_words_of_a_run_are_its_settings(store: TokenStore, tmp_path: Path) -> None:
    asked = settings(store, model__branches="[gss, aux_ffn]", run__epochs="null")
    words = Job("pha-tiny.text", tmp_path, asked).words()
    again = parse_overrides(words[words.index("--quiet") + 1 :])
    assert again == asked
    assert load_recipe("pha-tiny.text", again) == load_recipe("pha-tiny.text", asked)


@pytest.mark.slow
def test_a_training_that_fails_is_named(store: TokenStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job("pha-tiny.text", out, settings(store) | {"data.store": str(tmp_path / "absent")})
    with pytest.raises(PHAError, match=r"failed with exit code 2; see .*out\.log"):
        run_jobs([job], quiet(), parallel=2)
    out.mkdir(exist_ok=True)
    (out / "checkpoints").touch()
    with pytest.raises(PHAError, match="is no training run and holds checkpoints"):
        run_jobs([job], quiet(), parallel=2)


def test_the_command_plans_and_refuses(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "pha-tiny.text", "--out", str(tmp_path / "o"), *arguments(store)]
    main([*words, "--over", "schedule.floor=0.0,0.1", "--seeds", "2", "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["runs"]) == 4
    assert plan["total"]["tokens"] == 4 * 8 * 4 * 32
    assert not (tmp_path / "o").exists()
    seeds = (["--seeds", bad] for bad in ("0", "x", "-3", "1,-1", "1,1"))
    floors = ["--over", "schedule.floor=0.0,0.1"]
    for more in (
        *seeds,
        ["--run.seed=3"],
        [*floors, "--schedule.floor=0.2"],
        ["--over", "run.log_every=1,2"],
        [*floors, *floors],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, *more])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "o").exists()
