from __future__ import annotations

import json
import platform
import sysconfig
from dataclasses import astuple
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pha.data import (
    SPLITS,
    Counts,
    PreparationState,
    SourceOptions,
    TokenStore,
    cached_store,
    prepare,
)
from pha.data.encoding import byte_vocabulary
from pha.data.sources import open_source
from pha.data.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_sha256
from tests.data.common import write_records


@pytest.fixture
def store(split_folder: Path, tmp_path: Path) -> TokenStore:
    return prepare(str(split_folder), "bytes", tmp_path / "store")


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def change_record(store: TokenStore, **changes: object) -> None:
    record = json.loads((store.path / "store.json").read_text())
    (store.path / "store.json").write_text(json.dumps(record | changes))


def test_running_text_is_stored_byte_for_byte(store: TokenStore, split_folder: Path) -> None:
    assert store.splits == SPLITS
    for split, name in zip(SPLITS, ("train.txt", "valid.txt", "test.txt"), strict=True):
        tokens = store.tokens(split)
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.dtype("<u2")
        assert tokens.astype(np.uint8).tobytes() == (split_folder / name).read_bytes()
        assert store.document_starts(split).tolist() == [0]
    assert store.counts("validation") == Counts(tokens=16, documents=1, words=3, lines=2, bytes=16)
    assert store.counts("test") == Counts(tokens=11, documents=1, words=3, lines=0, bytes=11)
    assert store.counts("train").words == 20 * 5
    with pytest.raises(ValueError, match="read-only"):
        store.tokens("test")[0] = 1


def test_documents_end_with_end_of_text(document_folder: Path, tmp_path: Path) -> None:
    (document_folder / "doc-72.txt").write_text(f"é {END_OF_TEXT}\n")
    store = prepare(str(document_folder), "bytes", tmp_path / "store")
    assert store.tokens("validation").tolist() == [*f"é {END_OF_TEXT}\n".encode(), 256]
    assert store.counts("validation") == Counts(tokens=18, documents=1, words=2, lines=1, bytes=17)
    train = store.tokens("train")
    starts = store.document_starts("train")
    assert starts.dtype == np.int64
    ends = np.flatnonzero(train == 256)
    assert starts.tolist() == [0, *(ends[:-1] + 1)]
    assert ends[-1] == len(train) - 1
    counts = store.counts("train")
    assert counts.documents == len(starts)
    assert counts.tokens == counts.bytes + counts.documents
    texts = [document.text for document in open_source(str(document_folder)).documents("train")]
    stored = [train[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    assert stored == [list(text.encode()) for text in texts]


def test_separator_can_be_chosen(
    document_folder: Path, split_folder: Path, tmp_path: Path, refuses
) -> None:
    plain = prepare(str(document_folder), "bytes", tmp_path / "a", separator="none")
    assert 256 not in plain.tokens("train")
    assert plain.describe()["separator"] == "none"
    ended = prepare(str(split_folder), "bytes", tmp_path / "b", separator="end-of-text")
    assert ended.tokens("test").tolist() == [*b"no line end", 256]
    with refuses("separator", "maybe", "end-of-text"):
        prepare(str(split_folder), "bytes", tmp_path / "c", separator="maybe")


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
    assert store.counts("train").words == 300_000 + 100
    assert store.counts("train").lines == whole.count(b"\n")


def test_bpe_is_trained_on_the_train_split(split_folder: Path, tmp_path: Path) -> None:
    store = prepare(str(split_folder), "bpe:262", tmp_path / "store")
    expected = load_tokenizer("bpe:262", [(split_folder / "train.txt").read_bytes().decode()])
    assert store.tokenizer_sha256 == tokenizer_sha256(expected)
    assert store.vocab_size == 262
    tokenizer = store.tokenizer()
    assert tokenizer_sha256(tokenizer) == store.tokenizer_sha256
    assert tokenizer.decode(store.tokens("validation").tolist()) == "one two\n three \n"


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


def test_opening_gives_the_same_store(store: TokenStore) -> None:
    opened = TokenStore.open(store.path)
    assert opened.sha256 == store.sha256
    assert opened.describe() == store.describe()
    assert opened.describe()["counts"]["test"]["bytes"] == 11
    assert json.loads(json.dumps(opened.describe())) == opened.describe()


def test_sha256_follows_data_and_tokenizer(split_folder: Path, tmp_path: Path) -> None:
    def made(name: str, **options: str) -> str:
        return prepare(str(split_folder), "bytes", tmp_path / name, **options).sha256

    first = made("a")
    assert made("b") == first
    assert made("c", separator="end-of-text") != first
    (split_folder / "train.txt").write_text("other text")
    assert made("d") != first


def test_model_with_another_tokenizer(store: TokenStore, refuses) -> None:
    store.require_tokenizer(store.tokenizer_sha256)
    with refuses("tokenizer bytes", "abcdef", "prepare"):
        store.require_tokenizer("abcdef" * 10)


def test_split_that_is_absent(split_folder: Path, tmp_path: Path, refuses) -> None:
    (split_folder / "test.txt").unlink()
    store = prepare(str(split_folder), "bytes", tmp_path / "store")
    assert TokenStore.open(store.path).splits == ("train", "validation")
    for ask in (store.tokens, store.document_starts, store.counts):
        with refuses("no test split", "train, validation"):
            ask("test")


@pytest.mark.parametrize("verify", [True, False])
def test_stores_without_a_split_rule_are_read(store: TokenStore, verify: bool) -> None:
    record = json.loads((store.path / "store.json").read_text())
    del record["split"], record["tokenizer_training_bytes"]
    (store.path / "store.json").write_text(json.dumps(record))
    older = TokenStore.open(store.path, verify=verify)
    assert older.sha256 == store.sha256
    assert older.describe()["split"] is None


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_tokens(store: TokenStore, verify: bool, refuses) -> None:
    path = store.path / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with refuses("train.bin", "truncated", "prepare"):
        TokenStore.open(store.path, verify=verify)
    path.unlink()
    with refuses("train.bin", "missing"):
        TokenStore.open(store.path, verify=verify)


def test_flipped_bit_in_tokens(store: TokenStore, refuses) -> None:
    path = store.path / "validation.bin"
    data = bytearray(path.read_bytes())
    data[6] ^= 1
    path.write_bytes(data)
    TokenStore.open(store.path, verify=False)
    with refuses("validation.bin", "SHA-256"):
        TokenStore.open(store.path)


@pytest.mark.parametrize("starts", [[1], [0, 5], [0.0]])
def test_altered_document_starts(store: TokenStore, starts: list[float], refuses) -> None:
    np.save(store.path / "test.documents.npy", np.array(starts))
    with refuses("test.documents.npy", "prepare"):
        TokenStore.open(store.path, verify=False)


def test_document_starts_are_never_unpickled(store: TokenStore, refuses) -> None:
    np.save(store.path / "test.documents.npy", np.array([{}], dtype=object), allow_pickle=True)
    with refuses("test.documents.npy", "damaged"):
        TokenStore.open(store.path, verify=False)
    (store.path / "test.documents.npy").write_bytes(b"")
    with refuses("test.documents.npy", "damaged"):
        TokenStore.open(store.path, verify=False)


def test_swapped_tokenizer(store: TokenStore, refuses) -> None:
    load_tokenizer("bpe:258", ["abab"]).save_pretrained(str(store.path / "tokenizer"))
    with refuses("tokenizer", "prepare"):
        TokenStore.open(store.path, verify=False)
    (store.path / "tokenizer" / "tokenizer.json").unlink()
    with refuses("tokenizer.json"):
        TokenStore.open(store.path, verify=False)


def test_ids_beyond_the_vocabulary(store: TokenStore, refuses) -> None:
    change_record(store, vocab_size=100)
    with refuses("train.bin", "id 195", "100"):
        TokenStore.open(store.path)


def test_folders_that_are_no_store(store: TokenStore, tmp_path: Path, refuses) -> None:
    with refuses("not a token store", "store.json"):
        TokenStore.open(tmp_path)
    change_record(store, format=2)
    with refuses("format 2", "reads 1"):
        TokenStore.open(store.path)
    change_record(store, format=1, splits={"train": {"tokens": "many"}})
    with refuses("store.json", "damaged"):
        TokenStore.open(store.path)
    change_record(store, split="by hand")
    with refuses("store.json", "damaged"):
        TokenStore.open(store.path)
    (store.path / "store.json").write_text("[]")
    with refuses("not a token store"):
        TokenStore.open(store.path)
    (store.path / "store.json").write_text("{")
    with refuses("store.json", "JSON"):
        TokenStore.open(store.path)


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
    assert leftovers(out.parent) == []


def test_other_folders_are_not_overwritten(split_folder: Path, tmp_path: Path, refuses) -> None:
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


def test_a_split_that_stays_empty(split_folder: Path, tmp_path: Path, refuses) -> None:
    rows = write_records(tmp_path / "rows.jsonl", ["one", "two", "three"])
    with refuses("falls into the", "larger --holdout"):
        prepare(str(rows), "bytes", tmp_path / "store")
    write_records(tmp_path / "named" / "train.jsonl", ["", ""])
    write_records(tmp_path / "named" / "valid.jsonl", ["a"])
    with refuses("the train split", "no text"):
        prepare(str(tmp_path / "named"), "bytes", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert leftovers(tmp_path) == []


def test_cached_store_follows_the_split(tmp_path: Path) -> None:
    rows = write_records(tmp_path / "rows.jsonl", [f"text {number}" for number in range(200)])

    def path(**options) -> Path:
        chosen = SourceOptions(**options)
        return cached_store(str(rows), "bytes", tmp_path / "stores", options=chosen).path

    default = cached_store(str(rows), "bytes", tmp_path / "stores").path
    assert default == path() == path(split_seed=0)
    assert len({default, path(split_seed=1), path(holdout=Fraction(1, 8))}) == 3


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
