from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pha.data import SPLITS, Counts, TokenStore, prepare
from pha.data.tokenizer import load_tokenizer, tokenizer_sha256
from tests.data.conftest import Refuses


@pytest.fixture
def store(split_folder: Path, tmp_path: Path) -> TokenStore:
    return prepare(str(split_folder), "bytes", tmp_path / "store")


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


def test_opening_gives_the_same_store(store: TokenStore) -> None:
    opened = TokenStore.open(store.path)
    assert opened.sha256 == store.sha256
    assert opened.describe() == store.describe()
    assert opened.describe()["counts"]["test"]["bytes"] == 11
    assert json.loads(json.dumps(opened.describe())) == opened.describe()


def test_model_with_another_tokenizer(store: TokenStore, refuses: Refuses) -> None:
    store.require_tokenizer(store.tokenizer())
    other = load_tokenizer("bpe:258", ["a a a b a a"])
    with refuses("tokenizer bytes", tokenizer_sha256(other)[:12], "prepare"):
        store.require_tokenizer(other)


def test_split_that_is_absent(split_folder: Path, tmp_path: Path, refuses: Refuses) -> None:
    (split_folder / "test.txt").unlink()
    store = prepare(str(split_folder), "bytes", tmp_path / "store")
    assert TokenStore.open(store.path).splits == ("train", "validation")
    for ask in (store.tokens, store.document_starts, store.counts):
        with refuses("no test split", "train, validation"):
            ask("test")


def test_stores_without_a_split_rule_are_read(store: TokenStore) -> None:
    record = json.loads((store.path / "store.json").read_text())
    del record["split"], record["tokenizer_training_bytes"]
    (store.path / "store.json").write_text(json.dumps(record))
    older = TokenStore.open(store.path)
    assert older.sha256 == store.sha256
    assert older.describe()["split"] is None


def test_truncated_tokens(store: TokenStore, refuses: Refuses) -> None:
    path = store.path / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with refuses("train.bin", "truncated", "prepare"):
        TokenStore.open(store.path)
    path.unlink()
    with refuses("train.bin", "missing"):
        TokenStore.open(store.path)


def test_flipped_bit_in_tokens(store: TokenStore, refuses: Refuses) -> None:
    path = store.path / "validation.bin"
    data = bytearray(path.read_bytes())
    data[6] ^= 1
    path.write_bytes(data)
    with refuses("validation.bin", "SHA-256"):
        TokenStore.open(store.path)


@pytest.mark.parametrize("starts", [[1], [0, 5], [0.0]])
def test_altered_document_starts(store: TokenStore, starts: list[float], refuses: Refuses) -> None:
    np.save(store.path / "test.documents.npy", np.array(starts))
    with refuses("test.documents.npy", "prepare"):
        TokenStore.open(store.path)


def test_document_starts_are_never_unpickled(store: TokenStore, refuses: Refuses) -> None:
    np.save(store.path / "test.documents.npy", np.array([{}], dtype=object), allow_pickle=True)
    with refuses("test.documents.npy", "damaged"):
        TokenStore.open(store.path)
    (store.path / "test.documents.npy").write_bytes(b"")
    with refuses("test.documents.npy", "damaged"):
        TokenStore.open(store.path)


def test_swapped_tokenizer(store: TokenStore, refuses: Refuses) -> None:
    load_tokenizer("bpe:258", ["abab"]).save_pretrained(str(store.path / "tokenizer"))
    with refuses("tokenizer", "prepare"):
        TokenStore.open(store.path)
    (store.path / "tokenizer" / "tokenizer.json").unlink()
    with refuses("tokenizer.json"):
        TokenStore.open(store.path)


def test_ids_beyond_the_vocabulary(store: TokenStore, refuses: Refuses) -> None:
    change_record(store, vocab_size=100)
    with refuses("train.bin", "id 195", "100"):
        TokenStore.open(store.path)


def test_folders_that_are_no_store(store: TokenStore, tmp_path: Path, refuses: Refuses) -> None:
    with refuses("not a token store", "store.json"):
        TokenStore.open(tmp_path)
    change_record(store, format=2)
    with refuses("a newer pha, format 2", "reads up to 1"):
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
