"""Writing the files of a token store, as encoded pieces of documents come in."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pha.data.pieces import Encoded, Piece


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

    tokens: int = 0
    documents: int = 0
    words: int = 0
    lines: int = 0
    bytes: int = 0


class StoreWriter:
    """Writes `SPLIT.bin` and `SPLIT.documents.npy` into a folder; a context manager.

    Memory holds 8 bytes for each document, its place in the list of starts.

    Args:
        folder: an existing folder.
        splits: to be written.
        dtype: of the ids on disk.
        separator: id written after every document, or None.
    """

    def __init__(
        self, folder: Path, splits: Sequence[str], dtype: np.dtype[Any], separator: int | None
    ) -> None:
        ending = b"" if separator is None else np.array([separator], dtype=dtype).tobytes()
        self._files = ExitStack()
        self._writers = {
            split: _SplitWriter(folder, split, ending, dtype.itemsize) for split in splits
        }

    def __enter__(self) -> StoreWriter:
        for writer in self._writers.values():
            self._files.enter_context(writer.file)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    def add(self, batch: Sequence[Piece], encoded: Encoded) -> None:
        """Write the ids of the next pieces."""
        end = 0
        for piece, (tokens, words, lines) in zip(batch, encoded.counts.tolist(), strict=True):
            start, end = end, end + tokens
            self._writers[piece.split].add(piece, encoded.ids[start:end].tobytes(), words, lines)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write what remains and return each split's entry in store.json: counts and hashes."""
        return {split: writer.finish() for split, writer in self._writers.items()}


class _SplitWriter:
    def __init__(self, folder: Path, split: str, ending: bytes, itemsize: int) -> None:
        self.file = (folder / bin_name(split)).open("wb")
        self._starts_file = folder / starts_name(split)
        self._ending = ending
        self._itemsize = itemsize
        self._digest = hashlib.sha256()
        self._starts = array("q")
        self._tokens = self._words = self._lines = self._bytes = 0

    def add(self, piece: Piece, ids: bytes, words: int, lines: int) -> None:
        if piece.is_first:
            self._starts.append(self._tokens)
        data = ids + self._ending if piece.is_last else ids
        self.file.write(data)
        self._digest.update(data)
        self._tokens += len(data) // self._itemsize
        self._words += words
        self._lines += lines
        self._bytes += len(piece.data)

    def finish(self) -> dict[str, Any]:
        self.file.close()
        starts = np.array(self._starts, dtype="<i8")
        np.save(self._starts_file, starts, allow_pickle=False)
        counts = Counts(self._tokens, len(starts), self._words, self._lines, self._bytes)
        return {
            **asdict(counts),
            "sha256": self._digest.hexdigest(),
            "document_starts_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
        }


def bin_name(split: str) -> str:
    """The file with a split's ids."""
    return f"{split}.bin"


def starts_name(split: str) -> str:
    """The file with the positions of a split's documents."""
    return f"{split}.documents.npy"
