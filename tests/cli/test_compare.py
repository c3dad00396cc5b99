"""`pha compare`, and `pha eval` with several protocols, as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from pha.data import TokenStore
from pha.data.tokenizer import load_tokenizer
from tests.cli.conftest import Pha, Refused
from tests.modeling.common import scrambled, small_config


def saved_run(folder: Path, length: int, **fields: Any) -> Path:
    """A run folder with chosen weights and the settings that evaluation reads."""
    scrambled(small_config(vocab_size=257, **fields)).save_pretrained(folder / "model")
    load_tokenizer("bytes").save_pretrained(folder / "model")
    data = {"sequence_length": length, "packed_documents": False}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return saved_run(folder / "a", 32), saved_run(folder / "b", 32, branches=["attention"])


def test_protocols_side_by_side(pha: Pha, runs: tuple[Path, Path], store: TokenStore) -> None:
    words = ["eval", runs[0], "--data", store.path, "--split", "validation"]
    content = json.loads(pha(*words, "--protocol", "all", "--protocol", "16/4", "--json"))
    found = [entry["protocol"] for entry in content["evaluations"]]
    assert [p["name"] for p in found] == ["non-overlapping", "strided", "long", "16/4"]
    shapes = [(p["sequence_length"], p["stride"]) for p in found]
    assert shapes == [(32, 32), (32, 16), (128, 128), (16, 4)]
    assert len({entry["tokens"] for entry in content["evaluations"]}) == 1
    assert content["provenance"]["command"]
    one = json.loads(pha(*words, "--json"))
    assert one["perplexity"] == content["evaluations"][0]["perplexity"]
    assert "evaluations" not in one
    named = json.loads(pha(*words, "--protocol", "strided", "--sequence-length", 16, "--json"))
    assert (named["protocol"]["sequence_length"], named["protocol"]["stride"]) == (16, 8)
    table = pha(*words, "--protocol", "all")
    for word in ("non-overlapping", "32/16", "128/128", "bits per byte", "accuracy"):
        assert word in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--protocol", "fast"], "no protocol 'fast'"),
        (["--protocol", "8/16"], "stride is 16; it must be from 1 to 8"),
        (["--protocol", "0"], "the sequence length is 0"),
        (["--sequence-length", "0"], "the sequence length is 0"),
        (["--stride", "33"], "stride is 33; it must be from 1 to 32"),
        (["--protocol", "all", "--stride", "4"], "--protocol LENGTH/STRIDE"),
        (["--split", "dev"], "no dev split"),
    ],
)
def test_impossible_protocols(
    refused: Refused, runs: tuple[Path, Path], store: TokenStore, words: list[str], expected: str
) -> None:
    assert expected in refused("eval", runs[0], "--data", store.path, *words)


def test_compare_prints_and_writes(
    pha: Pha, runs: tuple[Path, Path], store: TokenStore, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "comparison"
    words = ["compare", *runs, "--data", store.path, "--block", 64]
    printed = pha(*words, "--out", out)
    content = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert " ".join(content["verdict"].split()) in " ".join(printed.split())
    for word in ("perplexity per byte", "token in its context", "not the seeds", "windows of 32"):
        assert word in printed
    names = ["comparison.json", "comparison.png", "comparison.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    title = ElementTree.parse(out / "comparison.svg").find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert content["verdict"] in str(title.text)
    again = json.loads(pha(*words, "--json"))
    same = ("verdict", "difference", "bootstrap", "perplexity_ratio", "breakdowns", "passages")
    for key in same:
        assert again[key] == content[key]
    assert content["provenance"]["command"]
    assert [e["protocol"]["sequence_length"] for e in content["evaluations"]] == [32, 32]
    assert len(content["blocks"]["differences"]) == content["difference"]["blocks"]


def test_a_run_against_itself_says_so(
    pha: Pha, runs: tuple[Path, Path], store: TokenStore, tmp_path: Path
) -> None:
    a = runs[0]
    words = ["compare", a, a / "model", "--data", store.path, "--block", 64]
    content = json.loads(pha(*words, "--json", "--out", tmp_path / "same"))
    assert content["difference"]["mean"] == content["difference"]["half_width"] == 0
    assert "do not differ" in content["verdict"]
    assert "do not differ" in pha(*words)


def test_what_cannot_be_compared(
    refused: Refused, runs: tuple[Path, Path], store: TokenStore, text_folder: Path, tmp_path: Path
) -> None:
    a, b = runs
    data = ["--data", store.path]
    longer = saved_run(tmp_path / "longer", 64)
    assert "choose one with --sequence-length" in refused("compare", a, longer, *data)
    packed = tmp_path / "packed"
    shutil.copytree(b, packed)
    settings = {"data": {"sequence_length": 32, "packed_documents": True}}
    (packed / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "--no-packed-documents" in refused("compare", a, packed, *data)
    assert "an interval needs 20" in refused("compare", a, b, *data)
    assert "a block has 0 tokens" in refused("compare", a, b, *data, "--block", 0)
    assert "does not exist" in refused("compare", a, tmp_path / "gone", *data)
    corpus = [(text_folder / "train.txt").read_text(encoding="utf-8")]
    other = tmp_path / "other"
    shutil.copytree(b, other)
    load_tokenizer("bpe:280", corpus).save_pretrained(other / "model")
    assert "different tokenizers" in refused("compare", a, other, *data, "--block", 64)
    (tmp_path / "file").write_text("")
    words = ["compare", a, b, *data, "--block", 64, "--out", tmp_path / "file" / "x"]
    assert "cannot be written" in refused(*words)


def test_different_lengths_may_be_asked_for(
    pha: Pha, runs: tuple[Path, Path], store: TokenStore, tmp_path: Path
) -> None:
    longer = saved_run(tmp_path / "longer", 64)
    words = ["compare", runs[0], longer, "--data", store.path, "--block", 64]
    content = json.loads(pha(*words, "--sequence-length", 48, "--stride", 16, "--json"))
    assert {e["protocol"]["stride"] for e in content["evaluations"]} == {16}
