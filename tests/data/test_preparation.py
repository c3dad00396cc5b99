from __future__ import annotations

import hashlib
import json
import platform
import signal
import subprocess
import sys
import sysconfig
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from pha.data import SPLITS, PreparationState, TokenStore, cached_store, prepare
from pha.data.encoding import byte_vocabulary
from pha.data.sources import open_source
from pha.data.tokenizer import load_tokenizer, tokenizer_sha256
from tests.data.common import write_records
from tests.data.conftest import Refuses

WORDS = "the state of the café is a state <|endoftext|>\n\n  of 中 😀 states, it's said "


def text(number: int) -> str:
    return f"{number} {WORDS}" * (1 + number * number % 40)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = [text(number) for number in range(300)]
    return write_records(tmp_path / "corpus.jsonl", [*texts[:9], "", *texts[9:]])


def files_of(store: TokenStore) -> dict[str, bytes]:
    files = (path for path in store.path.rglob("*") if path.is_file())
    return {path.relative_to(store.path).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_batches_and_threads_change_nothing(
    corpus: Path, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(str(corpus), tokenizer, tmp_path / "first")
    assert sum(first.counts(split).documents for split in first.splits) == 300
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for size in (1, 10_000):
        monkeypatch.setattr("pha.data.preparation._BATCH_BYTES", size)
        store = prepare(str(corpus), tokenizer, tmp_path / "other")
        assert files_of(store) == files_of(first)


def test_counts_and_hash_of_the_split_are_those_of_the_texts(corpus: Path, tmp_path: Path) -> None:
    store = prepare(str(corpus), "bpe:300", tmp_path / "store")
    tokenizer = store.tokenizer()
    lines = []
    found: dict[str, list[str]] = {split: [] for split in store.splits}
    for document in open_source(str(corpus)).documents():
        if document.text:
            found[document.split].append(document.text)
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            lines.append(f"{digest} {document.split}\n")
    for split, texts in found.items():
        counts, tokens = store.counts(split), store.tokens(split)
        assert counts.documents == len(texts)
        assert counts.words == sum(len(t.split()) for t in texts)
        assert counts.lines == sum(t.count("\n") for t in texts)
        assert counts.bytes == sum(len(t.encode()) for t in texts)
        starts = [*store.document_starts(split), counts.tokens]
        for t, start, end in zip(texts, starts, starts[1:], strict=False):
            assert tokenizer.decode(tokens[start : end - 1].tolist()) == t
            assert tokens[end - 1] == tokenizer.eos_token_id
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert store.describe()["split"]["sha256"] == expected


@pytest.mark.parametrize("name", ["train.txt", "train.jsonl"])
def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pha.data.preparation._BATCH_BYTES", 1 << 16)
    folder = tmp_path / "corpus"
    write_records(folder / "valid.jsonl", ["a"])
    if name == "train.txt":
        (folder / "valid.jsonl").rename(folder / "valid.txt")
    line = json.dumps({"text": WORDS * 50}) + "\n"
    (folder / name).write_text(line * 2_000)
    tracemalloc.start()
    try:
        store = prepare(str(folder), "bytes", tmp_path / "store")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert store.counts("train").bytes > 8_000_000
    assert peak < 6_000_000


# A suite that was started in the background ignores SIGINT, and so would its children.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import pha_command
from pha.cli import main
main(["prepare", *sys.argv[1:]])
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A preparation of stores/store in a process of its own, which will not end soon."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, times in (("train.txt", 40_000), ("valid.txt", 1)):
        (folder / name).write_text(text(20) * times)
    load_tokenizer("bpe:300", [text(20)]).save_pretrained(str(tmp_path / "tokenizer"))
    out = tmp_path / "stores" / "store"
    command = [sys.executable, "-c", PROGRAM, str(folder), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--tokenizer", str(tmp_path / "tokenizer")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 60
    while not any(tmp_path.glob("stores/.*.tmp.store/train.bin")):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate(timeout=60)


def test_interrupt_leaves_nothing(started: subprocess.Popen[str], tmp_path: Path) -> None:
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 130
    assert errors == "pha prepare: interrupted\n"
    assert list((tmp_path / "stores").iterdir()) == []


def test_a_killed_preparation_is_cleaned_up_by_the_next(
    started: subprocess.Popen[str], tmp_path: Path
) -> None:
    started.kill()
    started.communicate(timeout=60)
    host, out = platform.node(), tmp_path / "stores" / "store"
    left = {path.name for path in out.parent.iterdir()}
    assert left == {f".{host}-{started.pid}.tmp.store", ".store.lock"}
    others = {f".elsewhere-{started.pid}.tmp.store", f".{host}-{started.pid}.tmp.store2"}
    for name in others:
        (out.parent / name).mkdir()
    (tmp_path / "text.txt").write_text("a line\n" * 100)
    prepare(str(tmp_path / "text.txt"), "bytes", out)
    assert {path.name for path in out.parent.iterdir()} == {"store", *others}


def test_separator_can_be_chosen(document_folder: Path, split_folder: Path, tmp_path: Path) -> None:
    plain = prepare(str(document_folder), "bytes", tmp_path / "a", separator="none")
    assert 256 not in plain.tokens("train")
    assert plain.describe()["separator"] == "none"
    ended = prepare(str(split_folder), "bytes", tmp_path / "b", separator="end-of-text")
    assert ended.tokens("test").tolist() == [*b"no line end", 256]


def test_long_documents_are_stored_in_order(split_folder: Path, tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(150_000))
    (split_folder / "train.0.txt").write_text(text)
    (split_folder / "train.txt").rename(split_folder / "train.1.txt")
    store = prepare(str(split_folder), "bytes", tmp_path / "store", separator="end-of-text")
    whole = text.encode() + (split_folder / "train.1.txt").read_bytes()
    tokens = store.tokens("train")
    assert tokens[tokens < 256].astype(np.uint8).tobytes() == whole
    assert np.flatnonzero(tokens == 256).tolist() == [len(text), len(whole) + 1]
    assert store.document_starts("train").tolist() == [0, len(text) + 1]


def test_large_vocabularies_take_four_bytes(split_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    shifted = {entry: number + 70_000 for entry, number in byte_vocabulary().items()}
    (folder / "vocab.json").write_text(json.dumps({f"w{n}": n for n in range(70_000)} | shifted))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    store = prepare(str(split_folder), str(folder), tmp_path / "store")
    assert store.vocab_size == 70_257
    assert store.tokens("test").dtype == np.dtype("<u4")
    assert store.tokens("test").tolist() == [70_000 + byte for byte in b"no line end"]
    assert TokenStore.open(store.path).counts("test").tokens == 11


def test_failure_in_the_middle_leaves_nothing(split_folder: Path, tmp_path: Path) -> None:
    def fail(state: PreparationState) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "new" / "store"
    with pytest.raises(KeyboardInterrupt):
        prepare(str(split_folder), "bytes", out, progress=fail)
    assert list(out.parent.iterdir()) == []

    old = prepare(str(split_folder), "bytes", out)
    (split_folder / "train.txt").write_text("other text")
    with pytest.raises(KeyboardInterrupt):
        prepare(str(split_folder), "bytes", out, progress=fail)
    assert TokenStore.open(out).sha256 == old.sha256
    assert prepare(str(split_folder), "bytes", out).sha256 != old.sha256
    assert [path.name for path in out.parent.iterdir()] == ["store"]


def test_other_folders_are_not_overwritten(
    split_folder: Path, tmp_path: Path, refuses: Refuses
) -> None:
    before = sorted(split_folder.iterdir())
    with refuses(str(split_folder), "not a token store"):
        prepare(str(split_folder), "bytes", split_folder)
    (split_folder / "store.json").write_text('{"shop": "not ours"}')
    with refuses(str(split_folder), "not a token store"):
        prepare(str(split_folder), "bytes", split_folder)
    assert sorted(split_folder.iterdir()) == sorted([*before, split_folder / "store.json"])
    (tmp_path / "empty").mkdir()
    assert prepare(str(split_folder), "bytes", tmp_path / "empty").splits == SPLITS
    (tmp_path / "file").touch()
    with refuses("file"):
        prepare(str(split_folder), "bytes", tmp_path / "file")
    with refuses("cannot be written"):
        prepare(str(split_folder), "bytes", tmp_path / "file" / "store")


def test_progress_ends_with_all_bytes(split_folder: Path, tmp_path: Path) -> None:
    states: list[PreparationState] = []
    store = prepare(str(split_folder), "bpe:260", tmp_path / "s", progress=states.append)
    tokens = sum(store.counts(split).tokens for split in SPLITS)
    assert states == [
        PreparationState("tokenizer", fraction=None, documents=0, bytes=0, tokens=0),
        PreparationState("tokenizer", fraction=1.0, documents=1, bytes=460, tokens=0),
        PreparationState("encoding", fraction=None, documents=0, bytes=0, tokens=0),
        PreparationState("encoding", fraction=1.0, documents=3, bytes=487, tokens=tokens),
    ]


def test_a_tokenizer_is_trained_on_the_beginning_of_a_large_corpus(
    split_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (split_folder / "train.txt").rename(split_folder / "train.1.txt")
    (split_folder / "train.2.txt").write_text("qqqq zzzz " * 500)
    states: list[PreparationState] = []
    whole = prepare(str(split_folder), "bpe:262", tmp_path / "whole", progress=states.append)
    assert whole.describe()["tokenizer_training_bytes"] == 460 + 5000
    assert [s.fraction for s in states if s.stage == "tokenizer"] == [None, 460 / 5460, 1.0]
    monkeypatch.setattr("pha.data.preparation.TRAINING_BYTES", 400)
    store = prepare(str(split_folder), "bpe:262", tmp_path / "store")
    expected = load_tokenizer("bpe:262", [(split_folder / "train.1.txt").read_bytes().decode()])
    assert store.tokenizer_sha256 == tokenizer_sha256(expected) != whole.tokenizer_sha256
    assert store.describe()["tokenizer_training_bytes"] == 460
    assert store.counts("train").bytes == 5460
    plain = prepare(str(split_folder), "bytes", tmp_path / "plain")
    assert plain.describe()["tokenizer_training_bytes"] is None


def test_a_split_that_stays_empty(split_folder: Path, tmp_path: Path, refuses: Refuses) -> None:
    rows = write_records(tmp_path / "rows.jsonl", ["one", "two", "three"])
    with refuses("falls into the", "larger --holdout"):
        prepare(str(rows), "bytes", tmp_path / "store")
    write_records(tmp_path / "named" / "train.jsonl", ["", ""])
    write_records(tmp_path / "named" / "valid.jsonl", ["a"])
    with refuses("the train split", "no text"):
        prepare(str(tmp_path / "named"), "bytes", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob(".*"))


def test_cached_store_is_prepared_once(split_folder: Path, tmp_path: Path) -> None:
    stages: list[str] = []

    def opened(tokenizer: str = "bytes") -> TokenStore:
        stages.clear()
        return cached_store(
            str(split_folder),
            tokenizer,
            tmp_path / "stores",
            lambda state: stages.append(state.stage),
        )

    first = opened()
    assert first.path.parent == tmp_path / "stores"
    assert first.path.name.startswith("corpus-bytes-")
    assert stages == ["encoding", "encoding"]
    assert opened().path == first.path
    assert stages == []

    (first.path / "train.bin").write_bytes(b"damaged")
    assert opened().sha256 == first.sha256
    assert stages == ["encoding", "encoding"]

    assert opened("bpe:258").path != first.path
    (split_folder / "test.txt").write_text("a new test text")
    assert opened().path != first.path
    assert opened().counts("test").words == 4


def test_cached_store_follows_the_tokenizer_files(split_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary() | {"th": 256}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    plain = cached_store(str(split_folder), str(folder), tmp_path / "stores")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    merged = cached_store(str(split_folder), str(folder), tmp_path / "stores")
    assert merged.counts("train").tokens == plain.counts("train").tokens - 40
    assert TokenStore.open(plain.path).sha256 == plain.sha256


def test_cached_store_of_another_python(
    document_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in document_folder.iterdir():
        path.rename(path.with_suffix(".py"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(document_folder))
    monkeypatch.setattr(platform, "python_version", lambda: "3.98.0")
    first = cached_store("stdlib", "bytes", tmp_path / "stores")
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    second = cached_store("stdlib", "bytes", tmp_path / "stores")
    assert first.path != second.path
    assert "3.99.0" in second.describe()["description"]


@pytest.mark.shared_data
def test_wikitext_has_the_published_counts(shared_data: Path, tmp_path: Path) -> None:
    raw = shared_data / "wikitext-103"
    folder = tmp_path / "wikitext"
    folder.mkdir()
    (folder / "wiki.train.raw").write_text(" = Title = \n \n Text . \n")
    for split in ("valid", "test"):
        (folder / f"wiki.{split}.raw").write_bytes((raw / f"wiki.{split}.raw").read_bytes())
    store = prepare(str(folder), f"gpt2:{shared_data / 'gpt2'}", tmp_path / "store")
    validation, test = store.counts("validation"), store.counts("test")
    assert astuple(validation) == (249_887, 1, 213_886, 3_760, 1_146_846)
    assert astuple(test) == (286_221, 1, 241_211, 4_358, 1_290_590)
    assert validation.words + validation.lines == 217_646
    assert test.words + test.lines == 245_569
    assert store.tokens("test").max() < 50256
