"""`pha probe`, and kept losses in `pha eval` and `pha compare`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pha.data import TokenStore
from tests.cli.conftest import Pha, Refused
from tests.cli.test_compare import saved_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return saved_run(folder / "a", 64), saved_run(folder / "b", 64, branches=["attention"])


def test_probe_prints_and_writes(
    pha: Pha, runs: tuple[Path, Path], store: TokenStore, tmp_path: Path
) -> None:
    words = ["--data", store.path, "--max-tokens", 700, "--length", 128]
    printed = pha("probe", *runs, *words, "--out", tmp_path)
    for word in ("loss by position", "65–128", "b - a", f"a: {runs[0]}"):
        assert word in printed
    content = json.loads((tmp_path / "probe-position.json").read_text(encoding="utf-8"))
    assert content["models"] == {"a": str(runs[0]), "b": str(runs[1])}
    assert content["protocol"]["data_sha256"] == store.sha256
    means = content["panels"][0]["means"]
    apart = content["panels"][0]["less_first"]["b"]
    for label, one in means["a"].items():
        assert apart[label]["mean"] == pytest.approx(means["b"][label]["mean"] - one["mean"])
    assert {f"probe-position.{ending}" for ending in ("json", "png", "svg")} == {
        path.name for path in tmp_path.iterdir()
    }
    words += ["--probes", "position,classes"]
    same = json.loads(pha("probe", runs[0], runs[0], *words, "--json"))["probes"]
    assert same["position"]["panels"][0]["means"]["B: a"] == means["a"]
    for panel in (*same["position"]["panels"], *same["classes"]["panels"]):
        assert {value["mean"] for value in panel["less_first"]["B: a"].values()} == {0}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--probes", "colour"], "no probe 'colour'; choose position, context"),
        (["--length", "1"], "the length is 1; for this probe"),
        (["--length", "9999999"], "the length is 9,999,999; for this probe"),
        (["--piece", "0"], "--piece 0: at least 1 token"),
        (["--sequence-length", "0"], "--sequence-length 0: at least 1 token"),
        (["--max-tokens", "-5"], "--max-tokens -5: at least 1 token"),
        (["--split", "dev"], "no dev split"),
        (["--probes", "needles"], "needles need 64 frequent words of one token"),
    ],
)
def test_impossible_questions(
    refused: Refused, runs: tuple[Path, Path], store: TokenStore, words: list[str], expected: str
) -> None:
    assert expected in refused("probe", runs[0], "--data", store.path, *words)


def test_models_of_different_lengths_need_one(
    refused: Refused, runs: tuple[Path, Path], store: TokenStore, tmp_path: Path
) -> None:
    other = saved_run(tmp_path / "c", 32)
    said = refused("probe", runs[0], other, "--data", store.path)
    assert "sequences of 32 and 64 tokens; choose one with --sequence-length" in said


def test_kept_losses_compare_like_their_models(
    pha: Pha, runs: tuple[Path, Path], store: TokenStore, tmp_path: Path
) -> None:
    files = [tmp_path / "a.nats", tmp_path / "b.nats"]
    data = ["--data", store.path]
    for run, file in zip(runs, files, strict=True):
        one = json.loads(pha("eval", run, *data, "--nats", file, "--json"))
        assert one["perplexity"] == json.loads(pha("eval", run, *data, "--json"))["perplexity"]
    kept = json.loads(pha("compare", *files, *data, "--block", 64, "--json"))
    live = json.loads(pha("compare", *runs, *data, "--block", 64, "--json"))
    for key in ("a", "b", "verdict", "difference", "breakdowns", "passages", "blocks"):
        assert kept[key] == live[key]


def test_losses_of_something_else_are_refused(
    pha: Pha, refused: Refused, runs: tuple[Path, Path], store: TokenStore, tmp_path: Path
) -> None:
    a, b, part = (tmp_path / name for name in ("a", "b", "part"))
    data = ["--data", store.path]
    pha("eval", runs[0], *data, "--nats", a)
    pha("eval", runs[1], *data, "--nats", b, "--sequence-length", 32)
    pha("eval", runs[1], *data, "--nats", part, "--split", "validation")
    said = refused("compare", a, b, *data, "--block", 64)
    assert "A was scored with sequence_length 64 and B with 32; score both alike" in said
    assert "is of the validation split; add --split validation" in refused(
        "compare", a, part, *data
    )
    for option in (("--stride", 4), ("--precision", "bf16")):
        assert "leave out options of windows" in refused("compare", a, a, *data, *option)
    assert "is not a file of `pha eval --nats`" in refused("compare", a, runs[1], *data)
    (tmp_path / "text").write_text("no losses")
    assert "is not a file of" in refused("compare", a, tmp_path / "text", *data)
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "is not a file of" in refused("compare", a, tmp_path / "array.npy", *data)
    said = refused("eval", runs[0], *data, "--nats", a, "--protocol", "all")
    assert "--nats keeps the losses of one protocol" in said
