"""`pha prepare` as a user meets it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from pha.data import PreparationState, TokenStore
from pha.data.display import PreparationDisplay, describe_state
from tests.cli.conftest import Pha, Refused
from tests.data.common import write_records

TEXTS = [f"text number {number}\nof many\n" for number in range(400)]


def test_a_folder_of_split_archives(pha: Pha, tmp_path: Path) -> None:
    folder = tmp_path / "books"
    for name, texts in (("train", TEXTS[:9]), ("train-2", TEXTS[9:20]), ("valid", TEXTS[20:25])):
        write_records(folder / f"{name}.jsonl.xz", texts)
    words = [folder, "--tokenizer", "bytes", "--out", tmp_path / "store"]
    printed = pha("prepare", *words)
    store = TokenStore.open(tmp_path / "store")
    assert store.counts("train").documents == 20
    assert store.counts("validation").documents == 5
    split = store.describe()["split"]
    assert f"split: files named for their split, sha256 {split['sha256']}" in printed
    for part in ("tokens/s", "MB/s", "validation", f"{store.counts('train').tokens}"):
        assert part in printed
    facts = json.loads(pha("prepare", *words, "--json"))
    assert facts["sha256"] == store.sha256
    assert facts["split"] == split
    assert facts["counts"]["train"]["lines"] == 40
    assert facts["preparation"]["seconds"] > 0
    assert facts["preparation"]["tokens_per_second"] > 0
    assert facts["preparation"]["bytes_per_second"] > 0


def test_options_of_the_split(pha: Pha, tmp_path: Path) -> None:
    rows = write_records(tmp_path / "rows.parquet", TEXTS, field="body")
    words = [rows, "--tokenizer", "bytes", "--json", "--text-field", "body"]
    first = json.loads(pha("prepare", *words, "--out", tmp_path / "a", "--holdout", "0.2"))
    assert first["split"]["fractions"] == {"train": "3/5", "test": "1/5", "validation": "1/5"}
    assert 50 < first["counts"]["test"]["documents"] < 110
    options = ["--holdout", "1/5", "--split-seed", "9"]
    other = json.loads(pha("prepare", *words, "--out", tmp_path / "b", *options))
    assert other["split"]["seed"] == 9
    assert other["split"]["sha256"] != first["split"]["sha256"]


def test_the_documented_check_of_a_split(
    pha: Pha,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "corpus.jsonl", [*TEXTS, "", "café"])
    pha("prepare", "corpus.jsonl", "--tokenizer", "bytes", "--out", "store")
    exec(program, {})
    expected = TokenStore.open(tmp_path / "store").describe()["split"]["sha256"]
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rows.jsonl", "--text-field", "body"], "has no field 'body': it has number, text"),
        (["rows.jsonl", "--holdout", "0.7"], "between 0 and 0.5"),
        (["rows.jsonl", "--holdout", "some"], "'some' is not a number"),
        (["rows.jsonl", "--holdout", "1/0"], "'1/0' is not a number"),
        (["rows.jsonl", "--holdout", "0.0001"], "larger --holdout"),
        (["bad.jsonl"], "line 2 of bad.jsonl is not JSON"),
        (["cut.jsonl.xz"], "cut.jsonl.xz is cut short"),
        (["cut.parquet"], "reading cut.parquet failed"),
        (["nowhere"], "wikitext-103"),
    ],
)
def test_mistakes_end_in_one_line(
    refused: Refused,
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "rows.jsonl", TEXTS)
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": "bad\n')
    for name in ("cut.jsonl.xz", "cut.parquet"):
        path = write_records(tmp_path / name, TEXTS)
        path.write_bytes(path.read_bytes()[:-20])
    assert expected in refused("prepare", "--out", "store", "--tokenizer", "bytes", *words)
    assert not Path("store").exists()


def test_what_is_said_on_the_way() -> None:
    state = PreparationState("encoding", 0.25, documents=1200, bytes=50_000_000, tokens=12_000_000)
    assert describe_state(state, 20.0) == (
        "25%  1,200 documents  50 MB  2.5 MB/s  600,000 tokens/s  0:01:00 left"
    )
    stream = PreparationState("tokenizer", None, documents=3, bytes=2_000_000, tokens=0)
    assert describe_state(stream, 2.0) == "3 documents  2 MB  1.0 MB/s"
    assert describe_state(stream, 0.0) == "3 documents  2 MB"


def test_plain_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with PreparationDisplay(Console(file=stream)) as display:
        for step in range(1, 50):
            now[0] += 1.0
            display(PreparationState("encoding", step / 100, step, step * 10**6, step * 10**5))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("encoding: 16%  16 documents  16 MB  1.1 MB/s")


def test_a_terminal_sees_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with PreparationDisplay(console) as display:
        display(PreparationState("tokenizer", 0.5, 1, 10**6, 0))
        display(PreparationState("encoding", None, 2, 3 * 10**6, 10**6))
        display(PreparationState("encoding", 0.5, 4, 6 * 10**6, 2 * 10**6))
    printed = stream.getvalue()
    assert "tokenizer" in printed
    assert "1 documents" in printed
    assert "50%  4 documents" in printed


def test_a_few_files_are_cut_each(pha: Pha, tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text("".join(TEXTS[number * 80 :][:80]))
    printed = pha("prepare", folder, "--tokenizer", "bytes", "--out", tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    assert "split: position in the file, at line ends" in printed
    assert "5 files, each cut 90/5/5" in store.describe()["description"]
    counts = {split: store.counts(split) for split in store.splits}
    assert {split: each.documents for split, each in counts.items()} == dict.fromkeys(counts, 5)
    assert sum(each.bytes for each in counts.values()) == len("".join(TEXTS).encode())
    assert counts["train"].bytes == pytest.approx(18 * counts["test"].bytes, rel=0.1)


def test_several_sources_are_one_store(pha: Pha, refused: Refused, tmp_path: Path) -> None:
    books = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for book, texts in zip(books, (TEXTS[:200], TEXTS[200:]), strict=True):
        book.write_text("".join(texts))
    words = ["--tokenizer", "bytes", "--out", tmp_path / "store"]
    facts = json.loads(pha("prepare", *books, *words, "--json"))
    assert facts["source"] == f"{books[0]} {books[1]}"
    assert facts["counts"]["train"]["documents"] == 2
    assert sum(each["bytes"] for each in facts["counts"].values()) == len("".join(TEXTS))
    rows = write_records(tmp_path / "rows.jsonl", TEXTS)
    assert "split by different rules" in refused("prepare", books[0], rows, *words)


@pytest.mark.parametrize("kind", ["text", "records"])
def test_a_pipe_is_a_source(
    kind: str, pha: Pha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "book.txt"
    if kind == "records":
        file = write_records(tmp_path / "rows.jsonl", TEXTS)
    else:
        file.write_text("".join(TEXTS))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    words = ["--tokenizer", "bytes", "--json", "--out"]
    piped = json.loads(pha("prepare", "-", *words, tmp_path / "piped"))
    plain = json.loads(pha("prepare", file, *words, tmp_path / "plain"))
    assert piped["source"] == "-"
    assert (piped["sha256"], piped["counts"]) == (plain["sha256"], plain["counts"])


def test_a_closed_standard_input(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    words = ["--tokenizer", "bytes", "--out", "never-made"]
    assert "standard input is closed" in refused("prepare", "-", *words)


def test_the_tokenizer_of_a_run(pha: Pha, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(TEXTS))
    pha("prepare", book, "--tokenizer", "bpe:280", "--out", tmp_path / "a")
    (tmp_path / "run").mkdir()
    (tmp_path / "a" / "tokenizer").rename(tmp_path / "run" / "model")
    words = ["--tokenizer", tmp_path / "run", "--out", tmp_path / "b", "--json"]
    assert json.loads(pha("prepare", book, *words))["vocab_size"] == 280
