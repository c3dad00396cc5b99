"""Encoding in processes: the same store whatever their number, and nothing left when they die."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pha.data import TokenStore, open_source, prepare
from pha.data.documents import Document
from pha.data.encoding import TextEncoder
from pha.data.pieces import (
    Piece,
    batches,
    document_pieces,
    encode_pieces,
    receive,
    send,
)
from pha.data.pool import WORKER, encode_batches, usable_cores
from pha.data.splits import SplitHash
from pha.data.tokenizer import load_tokenizer
from tests.data.common import write_records

WORDS = "the state of the café is a state <|endoftext|>\n\n  of 中 😀 states, it's said "


def text(number: int) -> str:
    return f"{number} {WORDS}" * (1 + number * number % 40)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_records(tmp_path / "corpus.jsonl", [text(number) for number in range(400)])


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a few documents, and processes from the second one on."""
    monkeypatch.setattr("pha.data.pieces._BATCH_BYTES", 10_000)
    monkeypatch.setattr("pha.data.pool._ALONE_BYTES", 1)


def files_of(store: TokenStore) -> dict[str, bytes]:
    return {
        path.relative_to(store.path).as_posix(): path.read_bytes()
        for path in store.path.rglob("*")
        if path.is_file()
    }


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if WORKER in p.cmdline()]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_any_number_of_workers_writes_the_same_bytes(
    corpus: Path, tmp_path: Path, small_steps, tokenizer: str
) -> None:
    stores = [
        prepare(str(corpus), tokenizer, tmp_path / f"store-{workers}", workers=workers)
        for workers in (1, 2, 3)
    ]
    assert sum(stores[0].counts(split).documents for split in stores[0].splits) == 400
    assert files_of(stores[0]) == files_of(stores[1]) == files_of(stores[2])
    assert children() == []


def test_counts_and_hash_of_the_split_are_those_of_the_texts(
    corpus: Path, tmp_path: Path, small_steps
) -> None:
    store = prepare(str(corpus), "bpe:300", tmp_path / "store", workers=2)
    tokenizer = store.tokenizer()
    lines = []
    found: dict[str, list[str]] = {split: [] for split in store.splits}
    for document in open_source(str(corpus)).documents():
        found[document.split].append(document.text)
        lines.append(f"{hashlib.sha256(document.text.encode()).hexdigest()} {document.split}\n")
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


def test_small_corpora_start_no_process(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert prepare(str(corpus), "bytes", tmp_path / "store", workers=8).counts("train").tokens


def test_pieces_of_documents() -> None:
    encoder = TextEncoder(load_tokenizer("bytes"))
    long = "word " * 40_000
    documents = [
        Document("a", "train", ("",)),
        Document("b", "test", (long[:7], "", long[7:])),
        Document("c", "train", ("c",)),
    ]
    split_hash = SplitHash()
    pieces = list(document_pieces(documents, encoder, split_hash))
    assert [(p.split, p.is_first, p.is_last) for p in pieces] == [
        ("test", True, False),
        ("test", False, False),
        ("test", False, False),
        ("test", False, True),
        ("train", True, True),
    ]
    assert b"".join(piece.data for piece in pieces) == long.encode() + b"c"
    assert [piece for batch in batches(pieces) for piece in batch] == pieces


@pytest.mark.parametrize("together", [1, 10, 1 << 20])
def test_encoding_of_a_batch(together: int) -> None:
    tokenizer = load_tokenizer("bpe:280", [WORDS * 9])
    encoder = TextEncoder(tokenizer)
    texts = ["", "a", WORDS, " \n", WORDS * 3]
    encoded = encode_pieces(encoder, np.dtype("<u2"), [t.encode() for t in texts], together)
    ids = [encoder.encode(t) for t in texts]
    assert encoded.ids.dtype == np.dtype("<u2")
    assert encoded.ids.tolist() == np.concatenate(ids).tolist()
    expected = [[len(i), len(t.split()), t.count("\n")] for i, t in zip(ids, texts, strict=True)]
    assert encoded.counts.tolist() == expected


def test_messages() -> None:
    blocks = [b"", b"one", bytes(100_000)]
    stream = io.BytesIO()
    send(stream, blocks)
    send(stream, [])
    stream.seek(0)
    assert receive(stream) == blocks
    assert receive(stream) == []
    assert receive(stream) is None


def test_messages_cut_short(refuses) -> None:
    stream = io.BytesIO()
    send(stream, [b"one", b"two"])
    for size in (1, 8, 20, 26, 29):
        with refuses("cut short"):
            receive(io.BytesIO(stream.getvalue()[:size]))


def test_a_worker_that_is_killed_is_one_line(
    corpus: Path, tmp_path: Path, small_steps, refuses
) -> None:
    killed: list[psutil.Process] = []

    def kill(state: object) -> None:
        if not killed:
            killed.extend(children())
            for process in killed:
                process.kill()

    with refuses("killed by signal 9", "fewer --workers"):
        prepare(str(corpus), "bytes", tmp_path / "out" / "store", workers=2, progress=kill)
    assert list((tmp_path / "out").iterdir()) == []
    assert children() == []


def test_a_worker_that_cannot_start_is_one_line(
    corpus: Path, tmp_path: Path, small_steps, refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with refuses("a worker process ended with code 1"):
        prepare(str(corpus), "bytes", tmp_path / "store", workers=2)
    assert not (tmp_path / "store").exists()


def test_an_error_in_the_corpus_stops_the_workers(
    corpus: Path, tmp_path: Path, small_steps, refuses
) -> None:
    with corpus.open("a") as file:
        file.write("{")
    with refuses("line 401", "not JSON"):
        prepare(str(corpus), "bytes", tmp_path / "out" / "store", workers=2)
    assert list((tmp_path / "out").iterdir()) == []
    assert children() == []


def test_workers_are_few_batches_ahead(small_steps) -> None:
    encoder = TextEncoder(load_tokenizer("bytes"))
    taken = []

    def source():
        for number in range(50):
            taken.append(number)
            yield [Piece(b"abc", "train", True, True)]

    results = encode_batches(source(), encoder, np.dtype("<u2"), workers=2)
    for number, _ in enumerate(results):
        assert len(taken) <= number + 1 + 4
        if number == 9:
            break
    results.close()
    assert children() == []


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers(corpus: Path, tmp_path: Path, workers: int, refuses) -> None:
    with refuses(f"cannot be {workers} workers"):
        prepare(str(corpus), "bytes", tmp_path / "store", workers=workers)
    assert usable_cores() >= 1


# A suite that was started in the background ignores SIGINT, and so would its children.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import pha_command
import pha.data.pieces, pha.data.pool
from pha.cli import main
pha.data.pieces._BATCH_BYTES = 10_000
pha.data.pool._ALONE_BYTES = 1
main(["prepare", *sys.argv[1:], "--workers", "2"])
"""


def started(corpus: Path, out: Path) -> subprocess.Popen[str]:
    """A preparation in a process of its own that has two workers and will not end soon."""
    with corpus.open("a") as file:
        for number in range(40_000):
            file.write(json.dumps({"text": text(number)}) + "\n")
    tokenizer = corpus.parent / "tokenizer"
    load_tokenizer("bpe:300", [text(20)]).save_pretrained(str(tokenizer))
    command = [sys.executable, "-c", PROGRAM, str(corpus), "--tokenizer", str(tokenizer)]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 60
    while len(psutil.Process(process.pid).children()) < 2:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    return process


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_interrupt_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "stores" / "store"
    process = started(corpus, out)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "pha prepare: interrupted\n"
    assert gone(workers)
    assert list(out.parent.iterdir()) == []


def test_a_killed_preparation_is_cleaned_up_by_the_next(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "stores" / "store"
    process = started(corpus, out)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=60)
    assert gone(workers)
    host = platform.node()
    left = [path.name for path in out.parent.iterdir()]
    assert left == [f".store.{host}-{process.pid}.tmp"]
    others = {
        f".store.{host}-{os.getppid()}.tmp",
        f".store.elsewhere-{process.pid}.tmp",
        f".store2.{host}-{process.pid}.tmp",
    }
    for name in others:
        (out.parent / name).mkdir()
    (tmp_path / "text.txt").write_text("a line\n" * 100)
    prepare(str(tmp_path / "text.txt"), "bytes", out)
    assert {path.name for path in out.parent.iterdir()} == {"store", *others}
