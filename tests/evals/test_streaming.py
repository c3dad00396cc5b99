"""Text that grows token by token equals text decoded at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pha.data.encoding import TextEncoder
from pha.data.tokenizer import load_tokenizer
from pha.evals.streaming import TextStream

BYTES = load_tokenizer("bytes")
# Merges of a and b, so that a stop string begins and ends inside tokens.
MERGED = load_tokenizer("bpe:266", ["abab aabb abba bbaa babb aaba bbab " * 4])
END = 256


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.close()]


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first (the longest of those)."""
    for end in range(1, len(text) + 1):
        sizes = [len(s) for s in stop if text[:end].endswith(s)]
        if sizes:
            return text[: end - max(sizes)], True
    return text, False


@given(st.lists(st.integers(0, END), max_size=40))
def test_any_bytes_decode_as_they_do_at_once(tokens: list[int]) -> None:
    stream = TextStream(BYTES)
    assert "".join(pieces(stream, tokens)) == BYTES.decode(tokens, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_characters_come_whole(text: str) -> None:
    stream = TextStream(BYTES)
    parts = pieces(stream, TextEncoder(BYTES).encode(text).tolist())
    assert "".join(parts) == text == stream.text
    # One character for each last byte, nothing at the end.
    assert [len(part) for part in parts if part] == [1] * len(text)


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
@given(
    text=st.text("ab é", max_size=30),
    stop=st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings(tokenizer, text: str, stop: list[str]) -> None:
    stream = TextStream(tokenizer, stop)
    parts = pieces(stream, tokenizer(text)["input_ids"])
    assert ("".join(parts), stream.stopped) == cut(text, stop)
    assert stream.text == "".join(parts)


def test_merged_tokens_do_span_several_characters() -> None:
    assert len(MERGED("abababab")["input_ids"]) < 8


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    stream = TextStream(BYTES, ["END"])
    assert [stream.push(ord(c)) for c in "aENEND"] == ["a", "", "", "EN", "", ""]
    assert stream.stopped
    assert stream.push(ord("x")) == stream.close() == ""
    assert stream.text == "aEN"


def test_what_is_held_back_comes_at_the_end() -> None:
    stream = TextStream(BYTES, ["END"])
    assert [stream.push(token) for token in (*b"EN", 0xC3)] == ["", "", ""]
    assert stream.close() == "EN\ufffd"
