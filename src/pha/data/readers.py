"""Text out of one file: plain or compressed, or records of JSON lines or Parquet."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pha.data.compression import COMPRESSIONS, open_stream
from pha.utils.errors import PHAError

# No .py or .md here: train.py and test_plan.md are usually code and notes, not splits.
RUNNING_TEXT = frozenset({".txt", ".text", ".raw", ".tokens"})
DOCUMENT_TEXT = frozenset({".txt", ".text", ".md", ".rst", ".py"})
JSON_LINES = ".jsonl"
PARQUET = ".parquet"
KINDS = ".jsonl or .txt (also as .gz, .xz or .zst), .parquet"

_BLOCK = 1 << 20  # bytes read at once
_ROWS = 64  # rows turned into Python strings at once

Advance = Callable[[int], None]
"""Told how many bytes of the file on disk have been read so far."""


class FileKind(NamedTuple):
    """What the end of a file's name says: its suffix without the compression's, and that one."""

    suffix: str
    compression: str

    @property
    def is_records(self) -> bool:
        """Whether the file holds many documents."""
        return self.suffix == JSON_LINES or (self.suffix == PARQUET and not self.compression)

    @property
    def is_packed_text(self) -> bool:
        """Whether it is one compressed text."""
        return self.suffix in RUNNING_TEXT and bool(self.compression)

    @property
    def is_data(self) -> bool:
        """Whether it is records or compressed text, which is not there by chance."""
        return self.is_records or self.is_packed_text


def kind_of(path: Path) -> FileKind:
    """The kind of a file by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return FileKind(suffixes[0] if len(suffixes) == 2 else "", suffixes[-1])
    return FileKind(suffixes[-1] if suffixes else "", "")


def stem_of(path: Path) -> str:
    """A file's name without the endings that say its kind."""
    kind = kind_of(path)
    return path.name[: len(path.name) - len(kind.suffix) - len(kind.compression)]


def read_text(
    path: Path, advance: Advance, start: int = 0, end: int | None = None
) -> Iterator[str]:
    """Yield the text of a file in blocks, line ends and byte order marks untouched.

    Args:
        path: a file, compressed or not.
        advance: told the bytes read after each block.
        start: first byte, where characters begin, and
        end: the byte after the last, both of an uncompressed file.

    Raises:
        PHAError: it cannot be read, is damaged or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_stream(path) as stream:
        if start:
            stream.file.seek(start)
        left = end - start if end is not None else None
        while True:
            block = stream.file.read(_BLOCK if left is None else min(_BLOCK, left))
            left = None if left is None else left - len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise PHAError(
                    f"{path} is not UTF-8 text: convert it to UTF-8 or leave it out"
                ) from error
            if text:
                yield text
            if not block:
                return
            advance(stream.position - start)


def read_records(path: Path, field: str, advance: Advance) -> Iterator[tuple[int, str]]:
    """Yield number (from 1) and text of each record; memory holds one of them, or one row group.

    Args:
        path: .jsonl, compressed or not, or .parquet.
        field: that holds the text.
        advance: told the bytes read after each record or group.

    Raises:
        PHAError: it cannot be read or is damaged; a record without the field, or with something
            else than text in it.
    """
    reader = _read_parquet if kind_of(path).suffix == PARQUET else _read_json_lines
    return reader(path, field, advance)


def _read_json_lines(path: Path, field: str, advance: Advance) -> Iterator[tuple[int, str]]:
    with open_stream(path) as stream:
        for number, line in enumerate(stream.file, start=1):
            where = f"line {number} of {path}"
            if record := _decode_line(line, number, where):
                yield number, _text_of(_parse(record, where), field, where)
            advance(stream.position)


def _decode_line(line: bytes, number: int, where: str) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise PHAError(f"{where} is not UTF-8: convert the file to UTF-8") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PHAError(f"{where} is not JSON ({error}): correct or remove it") from error
    if not isinstance(record, dict):
        raise PHAError(f"{where} is not a JSON object: write {{..., ...}} on each line")
    return record


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise no_field(where, field, record)
    return as_text(record[field], field, where)


def no_field(where: str, field: str, present: Any) -> PHAError:
    """The error for a text field that is not there, naming those that are."""
    names = ", ".join(map(str, present)) or "none"
    return PHAError(
        f"{where} has no field {field!r}: it has {names}; name the one with the text "
        "with --text-field"
    )


def as_text(value: Any, field: str, where: str) -> str:
    """`value` if it is text that UTF-8 can write.

    Raises:
        PHAError: it is something else.
    """
    if not isinstance(value, str):
        kind = "nothing (null)" if value is None else type(value).__name__
        raise PHAError(
            f"field {field!r} in {where} is {kind}, not text: choose another field with "
            "--text-field, or remove the record"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PHAError(
            f"field {field!r} in {where} holds half a surrogate pair, which is no character: "
            "correct or remove the record"
        ) from error
    return value


def _read_parquet(path: Path, field: str, advance: Advance) -> Iterator[tuple[int, str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise PHAError("reading .parquet needs pyarrow: pip install 'pha[data]'") from error
    size = path.stat().st_size
    number = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            if field not in file.schema_arrow.names:
                raise no_field(str(path), field, file.schema_arrow.names)
            rows = file.iter_batches(_ROWS, columns=[field], use_threads=False)
            for batch in rows:
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, as_text(value, field, f"row {number} of {path}")
                advance(size * number // file.metadata.num_rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise PHAError(f"{path} is damaged or no Parquet file ({reason}): get it again") from error
