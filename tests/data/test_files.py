"""Folders and patterns of records and compressed texts."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from pha.data import SPLITS, SourceOptions, open_source
from pha.data.documents import Document
from pha.data.readers import Meter
from pha.data.splits import TextSplit
from tests.data.common import COMPRESS, RECORDS, write_records
from tests.data.conftest import Refuses

TEXTS = [f"text number {number} é\n" for number in range(300)]


def read(spec: Path | str, split: str | None = None, **options: Any) -> list[Document]:
    return list(open_source(str(spec), SourceOptions(**options)).documents(split))


def by_rule(texts: list[str], rule: TextSplit, split: str) -> list[str]:
    return [text for text in texts if rule.split_of(text) == split]


@pytest.mark.parametrize("suffix", RECORDS)
def test_one_file_of_records_is_split_by_text(tmp_path: Path, suffix: str) -> None:
    path = write_records(tmp_path / f"rows{suffix}", TEXTS)
    source = open_source(str(path))
    rule = TextSplit(0, Fraction(1, 20))
    found = list(source.documents())
    assert [document.text for document in found] == TEXTS
    assert [document.split for document in found] == [rule.split_of(text) for text in TEXTS]
    assert source.splits == SPLITS
    assert not source.joins_documents
    assert source.split_rule == rule.describe()
    for split in SPLITS:
        assert [d.text for d in source.documents(split)] == by_rule(TEXTS, rule, split)


def test_the_split_follows_seed_and_holdout_and_not_the_format(tmp_path: Path) -> None:
    rule = TextSplit(7, Fraction("0.2"))
    options = {"split_seed": 7, "holdout": Fraction("0.2")}
    write_records(tmp_path / "rows.jsonl", TEXTS)
    write_records(tmp_path / "other" / "part.parquet", TEXTS[::-1], field="body")
    test = by_rule(TEXTS, rule, "test")
    assert [d.text for d in read(tmp_path / "rows.jsonl", "test", **options)] == test
    other = read(tmp_path / "other", "test", text_field="body", **options)
    assert [d.text for d in other] == test[::-1]
    assert len(test) > 30


@pytest.mark.parametrize("suffix", RECORDS)
def test_files_named_for_splits_in_parts(tmp_path: Path, suffix: str) -> None:
    parts = ["train", "train-2", "train-10", "valid", "test-00000-of-00002", "test-00001-of-00002"]
    for number, name in enumerate(parts):
        write_records(tmp_path / f"{name}{suffix}", TEXTS[number * 10 : (number + 1) * 10])
    (tmp_path / "README.md").write_text("about these texts")
    source = open_source(str(tmp_path))
    assert source.splits == SPLITS
    assert source.split_rule == {"rule": "files named for their split"}
    assert [d.text for d in source.documents("train")] == TEXTS[:30]
    assert [d.text for d in source.documents("validation")] == TEXTS[30:40]
    assert [d.text for d in source.documents("test")] == TEXTS[40:60]
    assert [d.text for d in source.documents()] == TEXTS[:60]
    assert f"train{suffix}, train-2{suffix}, train-10{suffix}" in source.description
    pattern = open_source(str(tmp_path / f"*{suffix}"))
    assert list(pattern.documents()) == list(source.documents())


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_texts_named_for_splits_are_running_text(tmp_path: Path, suffix: str) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt{suffix}").write_bytes(COMPRESS[suffix](name.encode() * 9))
    source = open_source(str(tmp_path))
    assert source.joins_documents
    assert [(d.split, d.text) for d in source.documents()] == [
        ("train", "train" * 9),
        ("validation", "valid" * 9),
        ("test", "test" * 9),
    ]


def test_what_no_file_is_named_for_is_held_out_of_train(tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl", TEXTS)
    both = TextSplit(0, Fraction(1, 20))
    assert [d.text for d in read(tmp_path, "validation")] == by_rule(TEXTS, both, "validation")
    write_records(tmp_path / "test.jsonl", ["a test"])
    one = TextSplit(0, Fraction(1, 20), ("validation",))
    source = open_source(str(tmp_path))
    assert source.splits == SPLITS
    assert [d.text for d in source.documents("test")] == ["a test"]
    assert [d.text for d in source.documents("validation")] == by_rule(TEXTS, one, "validation")
    assert [d.text for d in source.documents("train")] == by_rule(TEXTS, one, "train")
    (tmp_path / "test.jsonl").rename(tmp_path / "valid.jsonl")
    source = open_source(str(tmp_path))
    assert source.splits == ("train", "validation")
    assert [d.text for d in source.documents("train")] == TEXTS


def test_folders_of_records_are_read_recursively(tmp_path: Path) -> None:
    write_records(tmp_path / "b" / "rows.jsonl.gz", TEXTS[:100])
    write_records(tmp_path / "a-10.parquet", TEXTS[100:200])
    write_records(tmp_path / "a-9.jsonl", TEXTS[200:])
    (tmp_path / "note.txt").write_text("a text beside them")
    (tmp_path / "packed.txt.xz").write_bytes(COMPRESS[".xz"](b"a packed text"))
    (tmp_path / "README.md").write_text("not a text")
    (tmp_path / ".hidden.jsonl").write_text("not read")
    found = read(tmp_path)
    texts = [*TEXTS[200:], *TEXTS[100:200], *TEXTS[:100], "a text beside them", "a packed text"]
    assert [d.text for d in found] == texts
    assert found[-1].split == TextSplit(0, Fraction(1, 20)).split_of("a packed text")


def test_patterns(tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "b" / "c" / "deep.jsonl", TEXTS[:100])
    write_records(tmp_path / "b" / "top.jsonl", TEXTS[100:200])
    (tmp_path / "b" / "note.md").write_text("a note")
    assert [d.text for d in read(tmp_path / "**" / "*.jsonl")] == TEXTS[:200]
    assert [d.text for d in read(tmp_path / "b" / "*.jsonl")] == TEXTS[100:200]
    assert [d.text for d in read(tmp_path / "b" / "no*")] == ["a note"]
    monkeypatch.chdir(tmp_path)
    assert [d.text for d in read("b/t?p.jsonl")] == TEXTS[100:200]
    with refuses("no file matches", "*.xz"):
        read(tmp_path / "*.xz")
    (tmp_path / "b" / "picture.png").touch()
    with refuses("picture.png", "not a kind of text"):
        read(tmp_path / "b" / "*")
    write_records(tmp_path / "b" / "train.jsonl", TEXTS)
    with refuses("train.jsonl", "top.jsonl", "keep one sort"):
        read(tmp_path / "b" / "*.jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_path_with_a_star_in_its_name_is_a_path(tmp_path: Path, suffix: str) -> None:
    write_records(tmp_path / f"rows[2]*{suffix}", TEXTS[:20])
    write_records(tmp_path / f"rows2{suffix}", TEXTS[20:40])
    assert len(read(tmp_path / f"rows[2]*{suffix}")) == 20


def test_folders_that_leave_open_what_is_meant(tmp_path: Path, refuses: Refuses) -> None:
    write_records(tmp_path / "a" / "train.jsonl", TEXTS)
    write_records(tmp_path / "a" / "extra.jsonl", TEXTS)
    with refuses("train.jsonl", "extra.jsonl", "pattern"):
        read(tmp_path / "a")
    write_records(tmp_path / "b" / "train.jsonl", TEXTS)
    write_records(tmp_path / "b" / "train.jsonl.xz", TEXTS)
    with refuses("more than one variant", "train.jsonl, train.jsonl.xz"):
        read(tmp_path / "b")
    write_records(tmp_path / "c" / "data" / "test.jsonl", TEXTS)
    with refuses("data/test.jsonl", "subfolder", "hf:"):
        read(tmp_path / "c")
    write_records(tmp_path / "d" / "valid.jsonl", TEXTS)
    with refuses("none for train"):
        read(tmp_path / "d")


@pytest.mark.parametrize("options", [{"holdout": Fraction(1, 10)}, {"split_seed": 0}])
def test_a_split_that_is_not_by_text_takes_no_options(
    document_folder: Path, split_folder: Path, options: dict, refuses: Refuses
) -> None:
    for spec in ("stdlib", document_folder, split_folder, split_folder / "train.txt"):
        with refuses("another rule", "--holdout"):
            read(spec, **options)


@pytest.mark.parametrize("holdout", ["0", "0.5", "-0.1", "1"])
def test_options_out_of_range(holdout: str, refuses: Refuses) -> None:
    with refuses(str(Fraction(holdout)), "between 0 and 0.5"):
        SourceOptions(holdout=Fraction(holdout))
    with refuses("split seed is -1"):
        SourceOptions(split_seed=-1)


def test_one_compressed_text_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "text.txt.gz").write_bytes(COMPRESS[".gz"](b"text\n" * 1000))
    with refuses("text.txt.gz", "decompress", "train.txt.gz"):
        read(tmp_path / "text.txt.gz")


def test_identity_follows_files_and_options(tmp_path: Path) -> None:
    path = write_records(tmp_path / "rows.jsonl", TEXTS)

    def identity(**options: Any) -> str:
        return open_source(str(path), SourceOptions(**options)).identity

    first = identity()
    assert identity() == identity(holdout=Fraction("0.05"), split_seed=0) == first
    others = [identity(split_seed=1), identity(holdout=Fraction(1, 4)), identity(text_field="b")]
    write_records(path, TEXTS[1:])
    assert len({first, *others, identity()}) == 5


def test_meter_runs_from_nothing_to_all(tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl.xz", TEXTS)
    write_records(tmp_path / "valid.jsonl.xz", TEXTS)
    meter = Meter()
    done = [meter.done for _ in open_source(str(tmp_path)).documents(meter=meter)]
    assert done == sorted(done)
    assert meter.done == meter.total
    assert meter.total == sum(path.stat().st_size for path in tmp_path.iterdir())
