"""Text to ids, fast and in bounded memory, with nothing but ordinary text in the result."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Between a visible character and a blank or line feed. No alternative of GPT-2's pattern
#   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
# matches white space after a visible character, so every match ends here or earlier; and the only
# look-ahead follows a run of white space, which the visible character has ended before the cut.
# Hence both sides match apart as they do together. Python's \S holds no character that the
# tokenizer takes for white space.
CUT = re.compile(r"(?<=\S)[ \n]")

_PIECE_CHARACTERS = 1 << 16


def cut(parts: Iterable[str], size: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Yield a text that comes in parts in pieces of `size` characters or a little more.

    A cut lies between a character that is not white space and a blank or line feed. There the
    tokens of a byte-level BPE with GPT-2's pre-tokeniser, and the words of `str.split`, are the
    same for the pieces as for the whole. A text without such places stays whole. Where parts
    begin and end makes no difference; memory holds one part and one piece.
    """
    rest = ""
    for part in parts:
        text, start = rest + part, 0
        begin = max(size, len(rest))
        while (found := CUT.search(text, begin)) is not None:
            yield text[start : found.start()]
            start = found.start()
            begin = start + size
        rest = text[start:]
    yield rest


def byte_vocabulary() -> dict[str, int]:
    """GPT-2's stand-in character for each byte: itself if printable, else the next from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


class TextEncoder:
    """Encodes text as text: `<|endoftext|>` in it becomes ordinary tokens, never the special one.

    Nothing is added, padded or truncated, whatever the tokenizer was told elsewhere. The encoder
    works on its own copy, because transformers resets these settings at every call.

    Args:
        tokenizer: gives the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        state = tokenizer.backend_tokenizer.to_str()
        self._backend = Tokenizer.from_str(state)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        parts = json.loads(state)
        self._cuts = _can_cut(parts)
        self._is_bytes = self._cuts and _is_bytes(parts["model"])

    def pieces_of(self, parts: Iterable[str]) -> Iterator[str]:
        """Yield a text in pieces whose ids, joined, are the ids of the text.

        It is cut as `cut` does where that is sound for the tokenizer, and else whole.
        """
        return cut(parts) if self._cuts else iter(("".join(parts),))

    def in_pieces(self, parts: Iterable[str], size: int) -> Iterator[np.ndarray]:
        """Yield the ids of a text that comes in parts, `size` at a time, the last ones fewer.

        Raises:
            PHAError: a size below 1.
        """
        if size < 1:
            raise PHAError(f"a piece has {size} tokens; at least 1")
        held: list[np.ndarray] = []
        count = 0
        for array in map(self.encode, self.pieces_of(parts)):
            held.append(array)
            count += len(array)
            if count >= size:
                ids = np.concatenate(held)
                whole = count - count % size
                yield from np.split(ids[:whole], whole // size)
                held, count = [ids[whole:]], count - whole
        if count:
            yield np.concatenate(held)

    def encode(self, text: str) -> np.ndarray:
        """The ids (int64, one dimension) of one text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids (int64, one dimension) of each text, all encoded side by side as they are.

        The tokenizer's threads work on them, as many as there are cores (or RAYON_NUM_THREADS).
        """
        if self._is_bytes:  # a hundred times faster than looking every byte up
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]


def _can_cut(state: dict[str, Any]) -> bool:
    """Whether `cut` is sound: GPT-2's pre-tokeniser and nothing else that looks at text."""
    before = state["pre_tokenizer"] or {}
    is_gpt2 = (
        before.get("type") == "ByteLevel" and before["use_regex"] and not before["add_prefix_space"]
    )
    only_special = all(token["special"] for token in state["added_tokens"])
    return bool(is_gpt2 and only_special and state["normalizer"] is None)


def _is_bytes(model: dict[str, Any]) -> bool:
    """Whether the ids are the UTF-8 bytes: nothing is merged and each byte has its value as id."""
    return model["type"] == "BPE" and not model["merges"] and model["vocab"] == byte_vocabulary()
