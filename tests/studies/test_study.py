"""Studies from the command line, in miniature: what is trained, shared, written and refused."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pha.cli import main
from pha.costs import cache_bytes, training_flops
from pha.data import TokenStore
from pha.evals.probes import PROBES
from pha.runs import RunFolder
from pha.studies import planning
from pha.studies.definition import load_study, only, parse_study, scales, study_names
from pha.studies.planning import plan_study
from pha.studies.published import find_published
from pha.train.recipes import load_recipe, parse_overrides
from pha.utils.errors import PHAError
from pha.utils.formats import read_yaml

MINIATURE = {
    "model.hidden_size": 32,
    "model.head_dim": 8,
    "model.state_size": 32,
    "data.sequence_length": 32,
    "run.steps": 4,
    "run.global_batch": 4,
    "run.precision": "fp32",
    "run.evaluations": 2,
    "run.evaluate_tokens": 200,
    "run.log_every": 2,
    "run.keep_best": 2,
    "run.average_best": 2,
}
SETTINGS = [f"--{key}={value}" for key, value in MINIATURE.items()]


def study(name: str, out: Path, store: TokenStore, *words: str) -> list[str]:
    return ["study", name, "--out", str(out), "--data", str(store.path), *words, *SETTINGS]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("name", study_names())
def test_every_study_plans_at_every_scale(name: str, store: TokenStore, tmp_path: Path) -> None:
    chosen, of_tasks = load_study(name), load_study(name).kind == "tasks"
    if of_tasks:  # whose trials are many, and as those of systems
        chosen = replace(chosen, tune=None)
    if chosen.kind == "efficiency":
        assert set(chosen.benchmark) == set(scales())
        return
    for scale in scales().values():
        if name == "systems-flops" and scale.name != "tiny":
            continue  # as in systems
        if of_tasks and scale.name != "tiny":
            continue  # the same
        asked = {"data.store": str(store.path)} if scale.needs_data and not of_tasks else {}
        plan = plan_study(chosen, scale, [0, 1], tmp_path, asked)
        jobs = plan.jobs()
        assert len(jobs) == 2 * len(chosen.variants)  # no two variants are the same
        for seed, job in enumerate(jobs[:2]):
            assert load_recipe(job.recipe, job.settings).run.seed == seed


def test_twins_have_the_same_parameters_at_tiny_scale(store: TokenStore, tmp_path: Path) -> None:
    from pha.model.parameters import count_parameters

    for name in ("branches", "composition", "gss"):
        asked = {"data.store": str(store.path)}
        plan = plan_study(load_study(name), scales()["tiny"], [0], tmp_path, asked)
        sizes = []
        for job in plan.jobs():
            model = load_recipe(job.recipe, job.settings).model
            sizes.append(sum(count_parameters(replace(model, vocab_size=8192)).values()))
        assert max(sizes) < 1.01 * min(sizes)


@pytest.mark.slow
def test_a_study_trains_compares_writes_and_is_reused(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(study("composition", tmp_path, store, "--seeds", "2", "--jobs", "2"))
    said = capsys.readouterr().out
    folder = tmp_path / "composition-tiny"
    content = read(folder / "study.json")
    parallel, sequential = content["variants"]
    runs = [Path(seed["run"]) for row in (parallel, sequential) for seed in row["seeds"]]
    assert len(set(runs)) == 4
    tests = {run: RunFolder(run).read_result().evaluations[0].perplexity for run in runs}
    assert parallel["measures"]["test"]["mean"] == pytest.approx(
        (tests[runs[0]] + tests[runs[1]]) / 2
    )
    (between, *inside) = content["differences"]
    assert (between["a"], between["b"]) == ("parallel", "sequential")
    expected = sum(tests[runs[i]] - tests[runs[i + 2]] for i in (0, 1)) / 2
    assert between["mean"] == pytest.approx(expected)
    assert [each["a"] for each in inside] == ["parallel:average", "sequential:average"]
    assert parallel["seeds"][0]["tokens_seen"] == 4 * 4 * 32
    assert parallel["seeds"][0]["provenance"]["torch"]
    for sentence in content["sentences"]:
        assert sentence in (folder / "table.md").read_text()
    rows = list(csv.reader((folder / "table.csv").open()))
    assert [row[1] for row in rows[1:]] == [
        "parallel",
        "sequential",
        "parallel, 180.5M (paper)",
        "sequential, 185.8M (paper)",
    ]
    assert rows[1][0].startswith("ours: scale tiny, 512 tokens seen")
    assert rows[3][0].startswith("paper")
    assert "16.42" in (folder / "table.tex").read_text()
    for plot in ("dots", "curves"):
        for suffix in ("svg", "png"):
            assert (folder / f"{plot}.{suffix}").stat().st_size > 1000
    assert "paired seeds" in " ".join(said.split())

    # Another study that asks for the same model trains it no second time.
    stamps = {run: (run / "result.json").stat().st_mtime_ns for run in runs}
    main(study("mixing", tmp_path, store, "--seeds", "2"))
    assert "2 of 2 runs are there already" in capsys.readouterr().err
    main(study("composition", tmp_path, store, "--seeds", "2", "--json"))
    again = json.loads(capsys.readouterr().out)
    assert again["variants"] == content["variants"]
    assert {run: (run / "result.json").stat().st_mtime_ns for run in runs} == stamps

    mixing = read(tmp_path / "mixing-tiny" / "study.json")["mixing"]
    final = [RunFolder(run).read_metrics().mixing for run in runs[:2]]
    last = [records[-1].layers for records in final]
    outer = [[layers[i].effective["gss"] for i in (0, 3)] for layers in last]
    inner = [[layers[i].effective["gss"] for i in (1, 2)] for layers in last]
    found = mixing["sandwich"]["ours (tiny, effective shares)"][0]
    for points, a, b in zip(found["points"], outer, inner, strict=True):
        assert points == pytest.approx(50 * (sum(a) - sum(b)))
    table = (tmp_path / "mixing-tiny" / "table.md").read_text()
    assert "layer 3" in table
    assert "46.9" in table


def _wait_for(condition: Callable[[], Any], process: subprocess.Popen[Any]) -> Any:
    while not (found := condition()):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_a_study_killed_in_the_middle_continues(store: TokenStore, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "{title: Mine, question: Why, variants: {a: {model: pha}}, plots: []}", encoding="utf-8"
    )
    words = study(str(path), tmp_path, store, "--seeds", "2", "--jobs", "2")
    longer = ["--run.steps=60", "--run.evaluations=20"]
    command = [sys.executable, "-m", "pha", *words, *longer]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        runs = tmp_path / "runs"
        _wait_for(lambda: len(list(runs.glob("*/seed-*/checkpoints/step-*"))) > 1, process)
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=300)[0].decode()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75
    assert said.strip().endswith("stopped; the same command continues")
    assert len(children) == 2
    assert not any(child.is_running() for child in children)
    assert not list(runs.glob("*/seed-*/result.json"))

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    logs = [log.read_text() for log in runs.glob("*/seed-*.log")]
    assert "continuing after step" in "".join([again.stdout, *logs])
    content = read(tmp_path / "mine-tiny" / "study.json")
    assert [seed["steps"] for seed in content["variants"][0]["seeds"]] == [60, 60]


@pytest.mark.slow
def test_a_cluster_takes_the_runs(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's own executor for one machine in place of the one for Slurm."""
    pytest.importorskip("submitit")
    from pha.studies import jobs

    monkeypatch.setattr(jobs, "CLUSTER", "local")
    main(study("mixing", tmp_path, store, "--seeds", "1", "--cluster", "gpu"))
    assert read(tmp_path / "mixing-tiny" / "study.json")["variants"][0]["diverged"] == 0
    assert list((tmp_path / "mixing-tiny" / "slurm").iterdir())


def test_a_plan_costs_nothing_and_names_its_price(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(study("branches", out, store, "--dry-run", "--json"))
    cost = json.loads(capsys.readouterr().out)
    assert len(cost["runs"]) == 21
    assert cost["total"]["tokens"] == 21 * 4 * 4 * 32
    assert not out.exists()
    main(["study", "wikitext103", "--scale", "paper", "--out", str(out), "--dry-run", "--json"])
    paper = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert len(paper["runs"]) == 10
    # The paper speaks of about 58k steps.
    assert all(57_500 < run["steps"] < 58_500 for run in paper["runs"])


@pytest.mark.slow
def test_wikitext103_at_paper_scale_from_a_local_folder(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHA_CACHE", str(tmp_path / "cache"))
    words = ["study", "wikitext103", "--scale", "paper", "--seeds", "1", "--out", str(tmp_path)]
    words += ["--data.source", str(text_folder), "--data.tokenizer", "bytes"]
    main(
        [
            *words,
            "--model.num_hidden_layers=2",
            *SETTINGS,
            "--model.num_attention_heads=4",
            "--model.num_key_value_heads=2",
        ]
    )
    content = read(tmp_path / "wikitext103-paper" / "study.json")
    assert [row["name"] for row in content["variants"]] == ["125m", "180m"]
    protocol = content["variants"][0]["seeds"][0]
    assert protocol["protocol"]["documents"] == "document boundaries ignored"
    table = (tmp_path / "wikitext103-paper" / "table.md").read_text()
    assert "| *Hedgehog†*" in table
    assert "PHA-125M (paper)" in table
    assert "not like for like: a pretrained GPT-2" in table
    known = find_published(load_study("wikitext103").published)
    assert [each["id"] for each in content["published"]] == [row.id for row in known]


def test_mistakes_are_one_line(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    data = ["--data", str(store.path)]
    assert "did you mean branches" in fails(["study", "branchs", *out], capsys)
    assert "did you mean tiny" in fails(["study", "branches", "--scale", "tinny", *out], capsys)
    assert "needs a token store" in fails(["study", "branches", *out], capsys)
    assert "--seeds" in fails(["study", "branches", *data, "--seeds", "0", *out], capsys)
    assert "twice" in fails(["study", "branches", *data, "--seeds", "1,1", *out], capsys)
    assert "nonsense" in fails(["study", "branches", *data, "nonsense", *out], capsys)
    assert "hidden_sise" in fails(
        ["study", "branches", *data, "--model.hidden_sise=3", *out], capsys
    )
    assert "trains nothing" in fails(["study", "efficiency", *data, *out], capsys)
    assert "takes no settings" in fails(["study", "list", "--run.steps=3"], capsys)
    assert "--cluster" in fails(
        ["study", "branches", *data, "--cluster", "gpu", *SETTINGS, *out], capsys
    )
    (tmp_path / "mine.yaml").write_text("{title: Mine}")
    assert "study mine: question is missing" in fails(
        ["study", f"{tmp_path}/mine.yaml", *out], capsys
    )
    assert "does not exist" in fails(["study", f"{tmp_path}/none.yaml", *out], capsys)
    assert "leave out --data" in fails(["study", "recall", *data, *out], capsys)
    assert not (tmp_path / "out" / "runs").exists()


def test_the_list_names_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "list", "--json"])
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == study_names()
    main(["study", "list"])
    assert "branches" in capsys.readouterr().out


BENCHMARK = {"modes": ["train"], "lengths": [8], "batch": 1, "precision": "fp32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columms": []}, "did you mean columns"),
        ({"title": None}, "title is missing"),
        ({"plots": ["pie"]}, "no plot 'pie'"),
        ({"baseline": "ful"}, "did you mean full"),
        ({"variants": {"full": {"model": "phaa"}}, "baseline": "full"}, "no model at scale tiny"),
        ({"kind": "other"}, "kind is 'other'"),
        ({"scales": {"huge": {}}}, "no scale 'huge'"),
        ({"columns": ["tset"]}, "did you mean test"),
        ({"contrasts": [["best", "tset"]]}, "did you mean test"),
        ({"contrasts": [["best"]]}, "contrasts are pairs"),
        ({"plots": ["settings"]}, "settings go along an axis"),
        ({"probe_length": 1}, "probe_length is 1; give at least 2"),
        ({"tune": {"key": "optimizer.learning_rate", "values": []}}, "tune has no values"),
        ({"tune": {"key": "run.steps", "values": [1.0], "sets": {}}}, "did you mean set"),
        ({"over": {"rate": {}}}, "has no variants"),
        ({"plots": ["laws"]}, "go along an axis"),
        ({"plots": ["shares"]}, "give one variant"),
        ({"kind": "mixing"}, "give one variant"),
        ({"benchmark": {"tiny": {"modes": [], "lengths": [], "batch": 1}}}, "precision is missing"),
        ({"benchmark": {"tiny": BENCHMARK | {"run": 1}}}, "did you mean runs"),
        (
            {"kind": "efficiency", "variants": {"full": {"model": "pha", "set": {"a": 1}}}},
            "leave out set",
        ),
    ],
)
def test_a_study_file_is_checked(change: dict[str, Any], message: str) -> None:
    content = {
        "title": "T",
        "question": "Q?",
        "variants": {"full": {"model": "pha"}, "other": {"model": "gss-only"}},
        "baseline": "full",
    }
    assert [each.model for each in parse_study("x", content).variants] == ["pha", "gss-only"]
    changed = {key: value for key, value in (content | change).items() if value is not None}
    with pytest.raises(PHAError, match=message):
        parse_study("x", changed)


def test_folders_are_named_by_content(store: TokenStore, tmp_path: Path) -> None:
    def folder(*words: str) -> Path:
        chosen, scale = load_study("mixing"), scales()["tiny"]
        asked = {"data.store": str(store.path)} | parse_overrides(words)
        return plan_study(chosen, scale, [0], tmp_path, asked).jobs()[0].out

    assert folder() == folder("--run.log_every=3") == folder("--run.seed=5")
    assert folder() == folder("--model.dt_min=0.001")  # the default
    assert len({folder(), folder("--run.steps=9"), folder("--model.dropout=0.1")}) == 3


def test_variants_that_come_to_one_run_are_refused(store: TokenStore, tmp_path: Path) -> None:
    data = {"data.store": str(store.path)}
    window = {"model": "pha", "set": {"model.attention_window": 16}}
    variants = {"all": {"model": "pha"}, "window": window}
    content = {"title": "T", "question": "Q?", "variants": variants}
    chosen, scale = parse_study("x", content), scales()["tiny"]
    assert (
        len(plan_study(chosen, scale, [0], tmp_path, {"data.store": str(store.path)}).jobs()) == 2
    )
    with pytest.raises(PHAError, match="all and window come to the same run"):
        plan_study(chosen, scale, [0], tmp_path, data | {"model.attention_window": 8})
    assert [each.name for each in only(chosen, ["all", "all"]).variants] == ["all"]


def test_a_task_has_no_text_to_probe(tmp_path: Path) -> None:
    chosen = replace(load_study("recall"), probes=["position"])
    with pytest.raises(PHAError, match="the task mqar has none"):
        plan_study(chosen, scales()["tiny"], [0], tmp_path, {})


TUNED = """
title: Rates
question: Which?
variants: {a: {model: gss-only}, b: {model: pha}}
tune: {key: optimizer.learning_rate, values: [0.01, 1000.0], set: {run.steps: 2}}
columns: [test, bits, cache, flops, speed]
plots: [cache, time]
"""


@pytest.mark.parametrize(
    ("found", "best"), [({0.01: 9.0, 1000.0: 8.5}, 1000.0), ({0.01: 9.0, 1000.0: None}, 0.01)]
)
def test_the_lowest_trial_decides(
    found: dict[float, float | None],
    best: float,
    store: TokenStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = parse_study("rates", yaml.safe_load(TUNED))
    plan = plan_study(study, scales()["tiny"], [0], tmp_path, {"data.store": str(store.path)})
    key = "optimizer.learning_rate"
    monkeypatch.setattr(planning, "_perplexity", lambda job: found[job.settings[key]])
    settled, choices = planning.settle(plan)
    assert settled.trials is None
    assert [choice.value for choice in choices] == [best, best]
    assert {jobs[0].settings[key] for jobs in settled.runs.values()} == {best}
    assert all(jobs[0].settings["run.steps"] == 200 for jobs in settled.runs.values())


@pytest.mark.slow
def test_variants_choose_their_own_setting_in_short_runs(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(TUNED, encoding="utf-8")
    words = study(str(path), tmp_path, store, "--only", "a", "--seeds", "1")
    main([*words, "--dry-run", "--json"])
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["steps"] for row in rows] == [2, 2, 4]
    main(words)
    content = read(tmp_path / "rates-tiny" / "study.json")
    (row,), (choice,) = content["variants"], content["tuning"]
    assert choice["tried"]["0.01"] > 1
    assert choice["tried"]["1000"] is None
    assert row["settings"]["optimizer.learning_rate"] == choice["value"] == 0.01
    assert row["seeds"][0]["steps"] == 4
    model = load_recipe(row["recipe"], row["settings"]).model
    assert row["measures"]["cache"]["mean"] == cache_bytes(model, 32)
    assert "at an end of what was tried" in " ".join(content["sentences"])
    for plot in ("cache", "time"):
        assert (tmp_path / "rates-tiny" / f"{plot}.png").stat().st_size > 1000
    capsys.readouterr()
    # A rate that is asked for needs no trials.
    main([*words, "--dry-run", "--json", "--optimizer.learning_rate", "0.01"])
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 1
    # Times of other hardware do not compare.
    both = study(str(path), tmp_path, store, "--seeds", "1", "--optimizer.learning_rate", "0.01")
    main(both)
    kept = [row["measures"] for row in read(tmp_path / "rates-tiny" / "study.json")["variants"]]
    assert all("speed" in each for each in kept)
    other = tmp_path / "speed.json"
    shutil.copy(tmp_path / "rates-tiny" / "study.json", other)
    result = Path(row["seeds"][0]["run"]) / "result.json"
    content = read(result)
    content["provenance"]["cpu"] = "a faster one"
    result.write_text(json.dumps(content))
    main(both)
    content = read(tmp_path / "rates-tiny" / "study.json")
    assert not any("speed" in each["measures"] for each in content["variants"])
    assert "a faster one" in content["sentences"][-1]
    assert not (tmp_path / "rates-tiny" / "time.png").exists()
    capsys.readouterr()
    assert "has no times" in fails([*both, "--times", str(tmp_path / "rates-tiny")], capsys)
    # Those of another study do.
    main([*both, "--times", str(other)])
    content = read(tmp_path / "rates-tiny" / "study.json")
    for row, before in zip(content["variants"], kept, strict=True):
        assert row["measures"]["speed"]["mean"] == before["speed"]["mean"]
        seconds = row["seeds"][0]["tokens_seen"] / before["speed"]["mean"]
        assert row["measures"]["seconds"]["mean"] == pytest.approx(seconds)
    assert content["times"]["study"] == str(other)
    assert (tmp_path / "rates-tiny" / "time.png").exists()
    assert f"by the speeds in {other}" in content["sentences"][-1]
    lacking = read(other)
    lacking["variants"][0]["name"] = "another"
    other.write_text(json.dumps(lacking))
    capsys.readouterr()
    assert "no time of a" in fails([*both, "--times", str(other)], capsys)
    capsys.readouterr()
    words = study(str(path), tmp_path, store, "--only", "c")
    assert "variant 'c'" in fails(words, capsys)


def test_a_study_may_be_like_another() -> None:
    like = parse_study("mine", {"like": "branches", "title": "Mine", "scales": {"tiny": {}}})
    model = load_study("branches")
    assert (like.title, like.variants, like.baseline) == ("Mine", model.variants, model.baseline)
    with pytest.raises(PHAError, match="did you mean branches"):
        parse_study("mine", {"like": "branch"})


def test_equal_flops_are_those_of_the_baseline(store: TokenStore, tmp_path: Path) -> None:
    asked = {"data.store": str(store.path)}
    equal, tokens = (
        plan_study(only(load_study(name), ["pha"]), scales()["tiny"], [0], tmp_path, asked)
        for name in ("systems-flops", "systems")
    )
    (job,), (same,) = equal.runs["pha"], tokens.runs["pha"]
    flops = load_recipe(job.recipe, job.settings).run.flops
    config = load_recipe(same.recipe, same.settings)
    model = replace(config.model, vocab_size=8192)
    length = config.data.sequence_length
    assert config.run.steps is not None
    seen = config.run.steps * config.run.global_batch * length
    assert flops == pytest.approx(seen * training_flops(model, length), rel=0.002)


def test_probes_of_a_study_are_known() -> None:
    content = read_yaml(resources.files("pha.studies") / "definitions" / "context.yaml")
    assert set(parse_study("context", content).probes) < set(PROBES)
    with pytest.raises(PHAError, match="no probe 'colour'; choose position"):
        parse_study("context", content | {"probes": ["colour"]})


@pytest.mark.slow
def test_a_study_probes_its_runs_once(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a probe finds is kept beside the run, and tabulated and drawn for each variant."""
    content = {
        "title": "Probed",
        "question": "How far?",
        "baseline": "attention",
        "variants": {
            "pha": {"label": "PHA", "model": "pha"},
            "attention": {"label": "attention", "model": "attention-only-shallow"},
        },
        "plots": [],
        "probes": ["position", "context"],
    }
    file = tmp_path / "probed.yaml"
    file.write_text(yaml.safe_dump(content))
    main(study(str(file), tmp_path, store, "--seeds", "2", "--jobs", "2"))
    assert "PHA - attention" in capsys.readouterr().out
    record = read(tmp_path / "probed-tiny" / "study.json")
    panel = record["probes"]["position"][0]
    assert list(panel["means"]) == ["attention", "PHA"]
    kept = sorted(tmp_path.glob("runs/*/seed-*/probe-position.json"))
    assert len(kept) == 4
    for name in ("probe-position", "probe-context"):
        assert (tmp_path / "probed-tiny" / f"{name}.png").stat().st_size > 1000
    assert read(kept[0])["reading"]["protocol"]["length"] == 77
    file.write_text(yaml.safe_dump(content | {"probe_length": 64}))  # which is another question
    main(study(str(file), tmp_path, store, "--seeds", "2", "--json"))
    record = json.loads(capsys.readouterr().out)
    assert all(read(path)["reading"]["protocol"]["length"] == 64 for path in kept)
    stamps = [path.stat().st_mtime_ns for path in kept]
    kept[0].unlink()
    main(study(str(file), tmp_path, store, "--seeds", "2", "--json"))
    assert json.loads(capsys.readouterr().out)["probes"] == record["probes"]
    now = [path.stat().st_mtime_ns for path in kept]
    assert now[1:] == stamps[1:]
    assert now[0] > stamps[0]
