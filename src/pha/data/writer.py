"""Writing one split of a token store: documents to ids on disk, a megabyte of text at a time."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pha.data.encoding import TextEncoder, cut_text
from pha.data.sources import Document

Progress = Callable[[str, int, int | None], None]
"""Called with the stage (`tokenizer` or a split), its bytes of text done, and all of them."""

_BATCH_CHARACTERS = 1 << 20  # encoded side by side, at some 100 bytes of memory each


@dataclass(frozen=True)
class Counts:
    """Sizes of a split; all but `tokens` are of its text, without separators.

    Attributes:
        tokens: ids, separators included.
        documents: documents that have text.
        words: `len(text.split())`.
        lines: line feeds.
        bytes: UTF-8 bytes.
    """

    tokens: int
    documents: int
    words: int
    lines: int
    bytes: int


class SplitWriter:
    """Writes `SPLIT.bin` and `SPLIT.documents.npy` into a folder.

    Args:
        folder: an existing folder.
        encoder: turns text into ids.
        dtype: of the ids on disk.
        separator: id written after every document, or None.
    """

    def __init__(
        self, folder: Path, encoder: TextEncoder, dtype: np.dtype[Any], separator: int | None
    ) -> None:
        self._folder = folder
        self._encoder = encoder
        self._dtype = dtype
        self._separator = [] if separator is None else [np.array([separator])]

    def write(
        self, split: str, documents: Iterable[Document], report: Callable[[int], None]
    ) -> dict[str, Any]:
        """Write a split and return its entry in store.json: counts and hashes.

        Memory holds one document and its place in the list of starts, whatever their number.

        Args:
            split: names the files.
            documents: those without text are passed over.
            report: called now and then with the bytes of text done.
        """
        starts = array("q")
        digest = hashlib.sha256()
        tokens = words = lines = size = 0
        with (self._folder / bin_name(split)).open("wb") as file:
            for batch in _batches(self._pieces(documents)):
                encoded = self._encoder.encode_batch([piece.text for piece in batch])
                for piece, ids in zip(batch, encoded, strict=True):
                    if piece.is_first:
                        starts.append(tokens)
                    if piece.is_last:
                        ids = np.concatenate([ids, *self._separator])
                    data = ids.astype(self._dtype).tobytes()
                    file.write(data)
                    digest.update(data)
                    tokens += len(ids)
                    lines += piece.text.count("\n")
                    # In small parts: splitting a whole corpus takes many times its memory.
                    for part in cut_text(piece.text):
                        words += len(part.split())
                        size += len(part.encode())
                report(size)
        offsets = np.array(starts, dtype="<i8")
        np.save(self._folder / starts_name(split), offsets, allow_pickle=False)
        return {
            **asdict(Counts(tokens, len(offsets), words, lines, size)),
            "sha256": digest.hexdigest(),
            "document_starts_sha256": hashlib.sha256(offsets.tobytes()).hexdigest(),
        }

    def _pieces(self, documents: Iterable[Document]) -> Iterator[_Piece]:
        for document in documents:
            done = 0
            for text in self._encoder.pieces(document.text):
                if text:
                    first, done = done == 0, done + len(text)
                    yield _Piece(text, first, done == len(document.text))


class _Piece(NamedTuple):
    text: str
    is_first: bool
    is_last: bool


def bin_name(split: str) -> str:
    """The file with a split's ids."""
    return f"{split}.bin"


def starts_name(split: str) -> str:
    """The file with the positions of a split's documents."""
    return f"{split}.documents.npy"


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
