from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pha.data.encoding import TextEncoder, byte_vocabulary, cut
from pha.data.tokenizer import load_tokenizer

GPT2_PATTERN = pre_tokenizers.ByteLevel(add_prefix_space=False)

# White space of every kind Unicode and Python know, and one of each class the pattern tells apart.
SPACES = (
    " \n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u2028\u2029\u202f\u205f\u3000\u200b"
)
AWKWARD = st.text(alphabet="  \n\n" + SPACES + "'sdlv" + "aÉ中e\u0301" + "17²" + ".,<|>\x00😀")


def pre_tokens(text: str) -> list[str]:
    return [token for token, _ in GPT2_PATTERN.pre_tokenize_str(text)]


@given(AWKWARD | st.text(), st.integers(1, 12))
def test_cut_text_keeps_tokens_and_words(text: str, size: int) -> None:
    pieces = list(cut((text,), size))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in pre_tokens(piece)] == pre_tokens(text)
    assert sum(len(piece.split()) for piece in pieces) == len(text.split())
    assert all(len(piece) >= size for piece in pieces[:-1])


@given(AWKWARD, st.integers(1, 12), st.lists(st.integers(0, 60), max_size=8))
def test_pieces_do_not_depend_on_the_parts_of_a_text(text: str, size: int, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in pairwise(bounds)]
    assert list(cut(parts, size)) == list(cut((text,), size))


def test_cut_text_takes_the_first_place_after_size() -> None:
    assert list(cut(("aaa bb \n c d",), 2)) == ["aaa", " bb", " \n c", " d"]
    assert list(cut(("no-place-to-cut",), 3)) == ["no-place-to-cut"]
    assert list(cut(("a" * 10 + "\r\nb",), 3)) == ["a" * 10 + "\r\nb"]
    assert list(cut(("",), 3)) == [""]


def bpe(text: str, **changes: object) -> TextEncoder:
    """An encoder for a BPE learnt on `text`, with parts of its backend replaced."""
    tokenizer = load_tokenizer("bpe:280", [text])
    for name, value in changes.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return TextEncoder(tokenizer)


SAMPLE = "the cat sat.\n\n  the dog's mat sat on\n\n\n   the cat's hat; the rat sat\n" * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"normalizer": normalizers.Strip()},
    ],
)
def test_text_is_cut_only_where_that_is_sound(changes: dict[str, object]) -> None:
    long = SAMPLE * 1000
    assert len(list(bpe(SAMPLE).pieces_of((long,)))) > 1
    assert list(bpe(SAMPLE, **changes).pieces_of((long,))) == [long]


def test_text_is_not_cut_beside_ordinary_added_tokens() -> None:
    tokenizer = load_tokenizer("bpe:280", [SAMPLE])
    tokenizer.backend_tokenizer.add_tokens([AddedToken("cat sat")])
    assert len(list(TextEncoder(tokenizer).pieces_of((SAMPLE * 1000,)))) == 1


def test_pieces_have_the_ids_of_the_whole() -> None:
    tokenizer = load_tokenizer("bpe:280", [SAMPLE])
    long = SAMPLE * 1000
    whole = tokenizer.backend_tokenizer.encode(long, add_special_tokens=False).ids
    encoder = TextEncoder(tokenizer)
    ids = encoder.encode_batch(list(encoder.pieces_of((long,))))
    assert len(ids) > 1
    assert ids[0].dtype == np.int64
    assert np.concatenate(ids).tolist() == whole


@pytest.mark.parametrize("spec", ["bytes", "bpe:280"])
def test_end_of_text_in_a_text_is_ordinary(spec: str) -> None:
    tokenizer = load_tokenizer(spec, [SAMPLE])
    text = "a<|endoftext|>b <|endoftext|>"
    encoder = TextEncoder(tokenizer)
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]
    ids = encoder.encode(text)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids.tolist()) == text
    assert np.array_equal(encoder.encode_batch([text])[0], ids)


def test_settings_of_the_tokenizer_are_ignored() -> None:
    tokenizer = load_tokenizer("bpe:280", [SAMPLE])
    expected = TextEncoder(tokenizer).encode(SAMPLE).tolist()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=4000)
    assert TextEncoder(tokenizer).encode(SAMPLE).tolist() == expected
    assert len(expected) > 4


@pytest.fixture(scope="module")
def byte_encoder() -> TextEncoder:
    return TextEncoder(load_tokenizer("bytes"))


@given(text=st.text())
def test_bytes_are_what_the_tokenizer_gives(byte_encoder: TextEncoder, text: str) -> None:
    backend = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = GPT2_PATTERN
    ids = byte_encoder.encode(text).tolist()
    assert ids == list(text.encode()) == backend.encode(text).ids


@pytest.mark.shared_data
def test_pieces_of_real_text_have_the_ids_of_the_whole(
    shared_data: Path, gpt2: PreTrainedTokenizerFast
) -> None:
    text = (shared_data / "wikitext-103" / "wiki.test.raw").read_bytes().decode()[:300_000]
    whole = gpt2.backend_tokenizer.encode(text, add_special_tokens=False).ids
    pieces = list(cut((text,), 40))
    assert len(pieces) > 5_000
    ids = TextEncoder(gpt2).encode_batch(pieces)
    assert np.concatenate(ids).tolist() == whole
    assert gpt2.decode(whole) == text
