"""Pieces of documents and their encoding: what goes to a worker process and what comes back."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from pha.data.documents import Document
from pha.data.encoding import TextEncoder, cut_text
from pha.data.splits import SplitHash
from pha.utils.errors import PHAError

_BATCH_BYTES = 1 << 20  # what a worker gets at once


class Piece(NamedTuple):
    """A stretch of a document.

    Attributes:
        data: its text in UTF-8.
        split: of the document.
        is_first: whether the document begins with it.
        is_last: whether the document ends with it.
    """

    data: bytes
    split: str
    is_first: bool
    is_last: bool


class Encoded(NamedTuple):
    """The encoding of a batch of pieces.

    Attributes:
        counts: (pieces, 3) int64: tokens, words and line feeds of each piece.
        ids: (tokens,) ids of all pieces, one after another, in the type they have on disk.
    """

    counts: np.ndarray
    ids: np.ndarray


def document_pieces(
    documents: Iterable[Document], encoder: TextEncoder, split_hash: SplitHash
) -> Iterator[Piece]:
    """Yield documents in pieces that may be encoded apart, and add each to `split_hash`.

    Documents without text are passed over.
    """
    for document in documents:
        digest = hashlib.sha256()
        held = b""
        is_first = True
        for text in encoder.pieces_of(document.parts):
            if held:
                yield Piece(held, document.split, is_first, False)
                is_first = False
            held = text.encode()
            digest.update(held)
        if held:
            split_hash.add(digest.hexdigest(), document.split)
            yield Piece(held, document.split, is_first, True)


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces in lists of a megabyte of text or a little more."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_pieces(
    encoder: TextEncoder, dtype: np.dtype[Any], pieces: Sequence[bytes], together: int
) -> Encoded:
    """Encode and count a batch.

    Args:
        encoder: turns text into ids.
        dtype: of the ids.
        pieces: UTF-8.
        together: encoded side by side are so many characters or a little more, at some 100 bytes
            of memory each.
    """
    counts = np.zeros((len(pieces), 3), dtype="<i8")
    ids: list[np.ndarray] = []
    group: list[str] = []
    size = 0
    for number, data in enumerate(pieces):
        text = data.decode()
        group.append(text)
        size += len(text)
        # In small parts: splitting a whole corpus takes many times its memory.
        counts[number, 1] = sum(len(part.split()) for part in cut_text(text))
        counts[number, 2] = text.count("\n")
        if size >= together or number == len(pieces) - 1:
            encoded = encoder.encode_batch(group)
            counts[number + 1 - len(group) : number + 1, 0] = [len(part) for part in encoded]
            ids += [part.astype(dtype) for part in encoded]
            group, size = [], 0
    return Encoded(counts, np.concatenate(ids))


def send(stream: IO[bytes], blocks: Sequence[bytes]) -> None:
    """Write a message: the number of blocks, their sizes (int64, little-endian), the blocks."""
    stream.write(struct.pack(f"<{len(blocks) + 1}q", len(blocks), *map(len, blocks)))
    for block in blocks:
        stream.write(block)
    stream.flush()


def receive(stream: IO[bytes]) -> list[bytes] | None:
    """Read what `send` wrote; None if the stream has ended before.

    Raises:
        PHAError: it ends in the middle of a message.
    """
    head = stream.read(8)
    if not head:
        return None
    (number,) = struct.unpack("<q", _whole(head, 8))
    sizes = struct.unpack(f"<{number}q", _whole(stream.read(8 * number), 8 * number))
    return [_whole(stream.read(size), size) for size in sizes]


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise PHAError("a message between processes is cut short: start again")
    return data
