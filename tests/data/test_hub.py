"""Data sets in the Hub's layout, made here; nothing is asked of the network."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from pha.data import SPLITS, SourceOptions, TokenStore, cached_store, open_source, prepare
from pha.data.hub import HubUnreachableError
from pha.data.splits import TextSplit
from tests.data.common import write_hub, write_records
from tests.data.conftest import Refuses

TEXTS = [f"web page {number} é\n\nwith two lines" for number in range(400)]
LINES = [" \n", " = Title = \n", " \n", " One line of text . \n", " \n", " \n", " Twö . \n"]


def wikitext_rows(text: str) -> list[str]:
    """Lines as the Hub has them: blank ones, which are a blank and a line feed, are empty."""
    return ["" if line == " \n" else line for line in text.splitlines(keepends=True)]


def answers(monkeypatch: pytest.MonkeyPatch, answer: Exception | str) -> None:
    def dataset_info(self: Any, name: str, **options: Any) -> huggingface_hub.DatasetInfo:
        if isinstance(answer, Exception):
            raise answer
        return huggingface_hub.DatasetInfo(id=name, sha=answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, ConnectionError("Name or service\nnot known"))


@pytest.mark.parametrize("config", ["wikitext-103-raw-v1", "wikitext-2-v1"])
@pytest.mark.parametrize("files", [1, 3])
def test_wikitext_is_restored(tmp_path: Path, config: str, files: int) -> None:
    texts = {split: "".join(LINES * n) for split, n in (("train", 200), ("validation", 3))}
    rows = {split: wikitext_rows(text) for split, text in texts.items()}
    assert "" in rows["train"]
    folder = write_hub(tmp_path / "wiki", config, rows, files)
    # The only configuration need not be named.
    for spec in (f"hf:{folder}:{config}", f"hf:{folder}"):
        source = open_source(spec)
        assert source.joins_documents
        assert source.splits == ("train", "validation")
        assert [(d.split, d.text) for d in source.documents()] == list(texts.items())


def test_other_data_sets_are_left_as_they_are(tmp_path: Path) -> None:
    rows = {"train": ["one", "", "two"], "validation": ["", " \n"]}
    folder = write_hub(tmp_path / "other", "wikitext-103-mine", rows)
    source = open_source(f"hf:{folder}:wikitext-103-mine")
    assert not source.joins_documents
    assert [d.text for d in source.documents()] == ["one", "", "two", "", " \n"]


def test_a_data_set_with_train_alone_is_split_by_text(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "web", "plain_text", {"train": TEXTS}, files=2)
    source = open_source(f"hf:{folder}:plain_text")
    rule = TextSplit(0, Fraction(5, 1000))
    assert source.splits == SPLITS
    assert source.split_rule == rule.describe()
    options = SourceOptions(holdout=Fraction(1, 10), split_seed=3)
    source = open_source(f"hf:{folder}:plain_text", options)
    rule = TextSplit(3, Fraction(1, 10))
    found = [(document.text, document.split) for document in source.documents()]
    assert found == [(text, rule.split_of(text)) for text in TEXTS]
    test = [document.text for document in source.documents("test")]
    assert test == [text for text in TEXTS if rule.split_of(text) == "test"]


def test_one_store_from_the_hubs_layout_and_from_json_lines(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "web", "plain_text", {"train": TEXTS}, files=2)
    rows = write_records(tmp_path / "rows.jsonl.zst", TEXTS)
    options = SourceOptions(holdout=Fraction(1, 10))
    first = prepare(f"hf:{folder}:plain_text", "bytes", tmp_path / "a", options=options)
    second = prepare(str(rows), "bytes", tmp_path / "b", options=options)
    assert first.sha256 == second.sha256
    assert first.describe()["split"] == second.describe()["split"]


def test_the_text_field(tmp_path: Path, refuses: Refuses) -> None:
    folder = tmp_path / "web"
    write_records(folder / "data" / "train.parquet", ["a"], field="body")
    write_records(folder / "data" / "validation.parquet", ["b"], field="body")
    options = SourceOptions(text_field="body")
    assert [d.text for d in open_source(f"hf:{folder}", options).documents()] == ["a", "b"]
    with refuses("no field 'text'", "number, body", "--text-field"):
        list(open_source(f"hf:{folder}").documents())
    with refuses("row 1 of split train", "'number'", "int"):
        list(open_source(f"hf:{folder}", SourceOptions(text_field="number")).documents())


def test_data_sets_that_lack_something(tmp_path: Path, refuses: Refuses) -> None:
    folder = write_hub(tmp_path / "web", "plain_text", {"train": TEXTS})
    with refuses("cannot be opened", "nope", "plain_text"):
        open_source(f"hf:{folder}:nope")
    folder = write_hub(tmp_path / "test", "plain_text", {"test": TEXTS})
    with refuses("lacks a train", "it has test"):
        open_source(f"hf:{folder}:plain_text")
    folder = write_hub(tmp_path / "dev", "x", {"train": TEXTS, "validation": ["a"], "dev": ["b"]})
    with refuses("two splits for validation"):
        open_source(f"hf:{folder}:x")
    (tmp_path / "nothing").mkdir()
    with refuses("cannot be opened"):
        open_source(f"hf:{tmp_path / 'nothing'}")
    with refuses("no folder hf:/no/where", "OWNER/NAME"):
        open_source("hf:/no/where:config")


def test_damaged_rows_are_named(tmp_path: Path, refuses: Refuses) -> None:
    folder = write_hub(tmp_path / "web", "c", {"train": TEXTS, "validation": ["a"]}, files=2)
    path = folder / "c" / "train-00001-of-00002.parquet"
    data = bytearray(path.read_bytes())
    data[100:1500] = bytes(1400)
    path.write_bytes(data)
    with refuses("split train", "failed after"):
        list(open_source(f"hf:{folder}:c").documents())


@pytest.mark.parametrize("spec", ["openwebtext", "wikitext-103", "wikitext-2", "hf:a/b:c"])
def test_no_network_is_one_line(spec: str, offline: None, refuses: Refuses) -> None:
    with refuses("does not answer", "Name or service", "hf:FOLDER:CONFIG"):
        open_source(spec)
    with pytest.raises(HubUnreachableError):
        open_source(spec)


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch, refuses: Refuses) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refuses("does not answer", "Skylion007/openwebtext", "offline mode"):
        open_source("openwebtext")


def test_a_data_set_that_the_hub_does_not_have(
    monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    response = SimpleNamespace(headers={}, request=None)
    error = huggingface_hub.errors.RepositoryNotFoundError("404", response=response)  # type: ignore[arg-type]
    answers(monkeypatch, error)
    with refuses("no public data set 'owner/nothing'", "log in"):
        open_source("hf:owner/nothing")


def test_a_path_comes_before_a_short_name(
    split_folder: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    monkeypatch.chdir(split_folder.parent)
    split_folder.rename("wikitext-2")
    assert open_source("wikitext-2").description.startswith("folder wikitext-2")


def test_a_cached_store_of_the_hub_is_used_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    """The data set itself is a local folder here; what the Hub says is its revision."""
    folder = write_hub(tmp_path / "web", "c", {"train": ["one"], "validation": ["two"]})
    load = datasets.load_dataset

    def load_folder(place: str, config: str, **options: object) -> object:
        return load(str(folder), config, streaming=True)

    def opened() -> TokenStore:
        return cached_store("hf:owner/web:c", "bytes", tmp_path / "stores")

    monkeypatch.setattr(datasets, "load_dataset", load_folder)
    answers(monkeypatch, "1" * 40)
    first = opened()
    assert "revision 1111" in first.describe()["description"]
    assert opened().path == first.path
    answers(monkeypatch, "2" * 40)
    second = opened()
    assert second.path != first.path
    answers(monkeypatch, ConnectionError("no network"))
    assert opened().path == second.path
    with refuses("does not answer"):
        cached_store("hf:owner/web:c", "bpe:260", tmp_path / "stores")
    with refuses("does not answer"):
        cached_store("hf:owner/other:c", "bytes", tmp_path / "stores")


@pytest.mark.shared_data
def test_wikitext_of_the_hub_is_the_published_file(shared_data: Path, tmp_path: Path) -> None:
    text = (shared_data / "wikitext-103" / "wiki.test.raw").read_bytes().decode()
    rows = {"train": ["a"], "validation": ["b"], "test": wikitext_rows(text)}
    folder = write_hub(tmp_path / "wiki", "wikitext-103-raw-v1", rows, 2)
    assert [d.text for d in open_source(f"hf:{folder}").documents("test")] == [text]
