from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import hub

from pha.data.encoding import TextEncoder, byte_vocabulary
from pha.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    saved_tokenizer_sha256,
    tokenizer_sha256,
    vocabulary_size,
)
from tests.data.conftest import Refuses

CORPUS = ["def scan(u, a):\n    return a * h + u\n", "the state of the scan is a state\n"] * 4


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return load_tokenizer("bpe:280", CORPUS)


def merges_of(tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return merges


def write_bpe_files(
    tokenizer: PreTrainedTokenizerFast, folder: Path, vocabulary: str, merges: str
) -> Path:
    """BPE's vocabulary and merges in the two-file form, under the given names."""
    folder.mkdir()
    (folder / vocabulary).write_text(json.dumps(tokenizer.get_vocab()), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges_of(tokenizer))]
    (folder / merges).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_bytes(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(byte_tokenizer) == vocabulary_size(byte_tokenizer) == 257
    assert byte_tokenizer("é a\n")["input_ids"] == [0xC3, 0xA9, 0x20, 0x61, 0x0A]
    assert byte_tokenizer.eos_token_id == byte_tokenizer.bos_token_id == 256
    assert byte_tokenizer.unk_token is None
    assert byte_tokenizer(f"a{END_OF_TEXT}")["input_ids"] == [97, 256]


def test_bpe_numbers_bytes_then_merges_then_end_of_text(bpe: PreTrainedTokenizerFast) -> None:
    vocabulary = bpe.get_vocab()
    assert sorted(vocabulary.values()) == list(range(280))
    assert {entry: vocabulary[entry] for entry in byte_vocabulary()} == byte_vocabulary()
    assert [vocabulary[a + b] for a, b in merges_of(bpe)] == list(range(256, 279))
    assert bpe.eos_token_id == 279
    assert len(TextEncoder(bpe).encode("the state")) < len("the state") / 2


def test_bpe_of_the_same_corpus_is_the_same(bpe: PreTrainedTokenizerFast) -> None:
    again = load_tokenizer("bpe:280", iter(CORPUS))
    assert tokenizer_sha256(again) == tokenizer_sha256(bpe)
    assert tokenizer_sha256(
        load_tokenizer("bpe:280", CORPUS[::-1] + CORPUS[1:2] * 9)
    ) != tokenizer_sha256(bpe)


def test_bpe_learns_end_of_text_in_a_corpus_as_text() -> None:
    tokenizer = load_tokenizer("bpe:262", [END_OF_TEXT * 9])
    assert "endoftext"[:2] in "".join("".join(pair) for pair in merges_of(tokenizer))
    assert tokenizer.eos_token_id == 261


@given(text=st.text())
def test_every_text_survives(
    byte_tokenizer: PreTrainedTokenizerFast, bpe: PreTrainedTokenizerFast, text: str
) -> None:
    for tokenizer in (byte_tokenizer, bpe):
        assert tokenizer.decode(TextEncoder(tokenizer).encode(text).tolist()) == text


@pytest.mark.parametrize(
    "spec", ["bpe:", "bpe:256", "bpe:4k", "bpe:-5", "bpe:²", "bpe:9999999", "bpe:" + "9" * 20]
)
def test_bpe_sizes_that_make_no_sense(spec: str, refuses: Refuses) -> None:
    with refuses(spec, "SIZE", "257"):
        load_tokenizer(spec, CORPUS)


def test_bpe_needs_enough_text(refuses: Refuses) -> None:
    with refuses("too small for bpe:4096", "entries"):
        load_tokenizer("bpe:4096", CORPUS)
    with refuses("bpe:4096", "corpus"):
        load_tokenizer("bpe:4096")
    assert len(load_tokenizer("bpe:257", [])) == 257


@pytest.mark.parametrize("name", ["byte_tokenizer", "bpe"])
def test_saving_keeps_the_hash(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_sha256(loaded) == saved_tokenizer_sha256(tmp_path)
    assert tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer)
    assert (loaded.eos_token, loaded.bos_token) == (END_OF_TEXT, END_OF_TEXT)
    assert loaded.unk_token is None
    assert loaded.decode(loaded("a , b .")["input_ids"]) == "a , b ."


def test_the_hash_is_of_what_determines_ids(bpe: PreTrainedTokenizerFast) -> None:
    tokenizer = load_tokenizer("bytes")
    before = tokenizer_sha256(tokenizer)
    tokenizer("a text", truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert tokenizer_sha256(tokenizer) != before
    assert tokenizer_sha256(bpe) != before


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_folder_with_vocabulary_and_merges(
    bpe: PreTrainedTokenizerFast, tmp_path: Path, names: tuple[str, str]
) -> None:
    folder = write_bpe_files(bpe, tmp_path / "bpe", *names)
    loaded = load_tokenizer(str(folder))
    text = "the state of the scan\n"
    assert loaded.eos_token_id == 279
    assert loaded(text)["input_ids"] == bpe(text)["input_ids"]


def test_folders_that_hold_no_good_tokenizer(
    bpe: PreTrainedTokenizerFast, tmp_path: Path, refuses: Refuses
) -> None:
    with refuses("nowhere", "bpe:SIZE", "gpt2:FOLDER"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with refuses("no tokenizer"):
        load_tokenizer("")
    with refuses(str(tmp_path), "encoder.json and vocab.bpe", "tokenizer.json"):
        load_tokenizer(str(tmp_path))
    folder = write_bpe_files(bpe, tmp_path / "bpe", "encoder.json", "vocab.bpe")
    with refuses("not GPT-2's"):
        load_tokenizer(f"gpt2:{folder}")
    (folder / "vocab.bpe").write_text("#version: 0.2\nnot two words\n")
    with refuses("vocab.bpe", "merges"):
        load_tokenizer(str(folder))
    (folder / "vocab.bpe").write_text("#version: 0.2\nzz zz\n")
    with refuses("vocab.bpe", "merges"):
        load_tokenizer(str(folder))
    (folder / "vocab.bpe").write_text("")
    (folder / "encoder.json").write_text('{"a": 0}')
    with refuses("byte-level"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with refuses("tokenizer.json"):
        load_tokenizer(str(folder))
    with refuses("tokenizer.json"):
        saved_tokenizer_sha256(folder)


def test_saved_tokenizer_that_loses_text(tmp_path: Path, refuses: Refuses) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(str(tmp_path / "lower"))
    with refuses("lower", "give back"):
        load_tokenizer(str(tmp_path / "lower"))
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(str(tmp_path / "words"))
    with refuses("words", "give back"):
        load_tokenizer(str(tmp_path / "words"))


def test_gpt2_without_the_hub(monkeypatch: pytest.MonkeyPatch, refuses: Refuses) -> None:
    def unreachable(repository: str, name: str) -> str:
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr(hub, "cached_file", unreachable)
    with refuses("Hub", "gpt2:FOLDER"):
        load_tokenizer("gpt2")


@pytest.mark.shared_data
def test_gpt2_ids(
    shared_data: Path,
    gpt2: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shared_data / "gpt2"
    assert gpt2("Hello world")["input_ids"] == [15496, 995]
    assert gpt2.eos_token_id == gpt2.bos_token_id == 50256
    assert len(gpt2) == vocabulary_size(gpt2) == 50257
    text = "naïve\r\n\n   café 中文 <|endoftext|> isn't , 2²\t\x00 😀"
    assert gpt2.decode(TextEncoder(gpt2).encode(text).tolist()) == text

    shutil.copy(folder / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(folder / "vocab.bpe", tmp_path / "merges.txt")
    monkeypatch.setattr(hub, "cached_file", lambda repository, name: str(tmp_path / name))
    assert tokenizer_sha256(load_tokenizer("gpt2")) == tokenizer_sha256(gpt2)
