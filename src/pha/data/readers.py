"""Text out of one file or data set: plain or compressed text, JSON lines, rows of `datasets`.

Plain text and JSON lines are read here, because `datasets` changes line ends, takes texts that
look like dates for dates, and accepts a .zst file that is cut short.
"""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple

from pha.data.encoding import CUT
from pha.data.remote import RemoteFile, RemoteStream, TextFile, first_line, size_of
from pha.utils.errors import PHAError
from pha.utils.formats import parse_json, require_encodable, require_text

# No .py or .md here: train.py and test_plan.md are usually code and notes, not splits.
RUNNING_TEXT = frozenset({".txt", ".text", ".raw", ".tokens"})
DOCUMENT_TEXT = frozenset({".txt", ".text", ".md", ".rst", ".py"})
COMPRESSIONS = frozenset({".gz", ".xz", ".zst"})
KINDS = ".jsonl or .txt (also as .gz, .xz or .zst), .parquet"

_BLOCK = 1 << 20  # bytes read at once
_BUFFER = 1 << 16  # the same of a file with lines
_LINE = 1 << 27  # bytes of a line of records at most, which memory holds several times
_STRETCH = 1 << 24  # characters at most that nothing can be cut in, so that memory holds them
_ROWS = 64  # rows turned into Python strings at once


@dataclass
class Meter:
    """How far a pass over a source is.

    Attributes:
        done: read so far, in bytes of files or in rows.
        total: of the same, all there is to read; None where that is not known.
    """

    done: int = 0
    total: int | None = None

    def add(self, size: int) -> None:
        """Count what was read."""
        self.done += size

    @property
    def fraction(self) -> float | None:
        """Between 0 and 1, or None where nothing is read yet or the total is not known."""
        return min(1.0, self.done / self.total) if self.total and self.done else None


class FileKind(NamedTuple):
    """What a file's name says: its name without endings, its suffix, that of its compression."""

    stem: str
    suffix: str
    compression: str

    @property
    def is_records(self) -> bool:
        """Whether the file holds many documents."""
        return self.suffix == ".jsonl" or (self.suffix == ".parquet" and not self.compression)

    @property
    def is_document(self) -> bool:
        """Whether it is one plain text."""
        return self.suffix in DOCUMENT_TEXT and not self.compression

    @property
    def is_packed_text(self) -> bool:
        """Whether it is one compressed text."""
        return self.suffix in RUNNING_TEXT and bool(self.compression)

    @property
    def is_data(self) -> bool:
        """Whether it is records or compressed text, which is not there by chance."""
        return self.is_records or self.is_packed_text


def kind_of(path: TextFile) -> FileKind:
    """The kind of a file by its name."""
    suffix = PurePath(path.name).suffix
    compression = suffix if suffix.lower() in COMPRESSIONS else ""
    inner = PurePath(path.name.removesuffix(compression))
    return FileKind(inner.stem, inner.suffix.lower(), compression.lower())


def read_text(
    path: TextFile, meter: Meter, start: int = 0, end: int | None = None
) -> Iterator[str]:
    """Yield the text of a file in blocks, line ends untouched; a byte order mark is no part of it.

    Args:
        path: a file, compressed or not.
        meter: counts the bytes read from disk.
        start: first byte, where characters begin, and
        end: the byte after the last, both of an uncompressed file.

    Raises:
        PHAError: it cannot be read, is damaged, is not UTF-8, holds zero bytes or endless words.
    """
    decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
    stretch = 0
    left = sys.maxsize if end is None else end - start
    with _open_bytes(path, meter) as file:
        if start:
            file.seek(start)
        try:
            while left and (block := file.read(min(_BLOCK, left))):
                left -= len(block)
                text = require_text(decoder.decode(block), str(path))
                stretch = 0 if CUT.search(text) else stretch + len(text)
                if stretch > _STRETCH:
                    raise PHAError(
                        f"{path} has over {_STRETCH:,} characters without a blank or line end: it "
                        "is no text, or needs lines"
                    )
                yield text
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise PHAError(
                f"{path} is not UTF-8 text: convert it to UTF-8 or leave it out"
            ) from error


def line_end(path: TextFile, position: int) -> int:
    """The position after the line feed that follows, in an uncompressed file."""
    with _open_bytes(path, Meter()) as file:
        file.seek(position)
        file.readline()
        return file.tell()


def read_records(path: TextFile, field: str, meter: Meter) -> Iterator[str]:
    """Yield the text of each record; memory holds one of them, or 64 rows.

    Args:
        path: .jsonl, compressed or not, or .parquet.
        field: that holds the text.
        meter: counts the bytes read from disk; of .parquet, the file at its end.

    Raises:
        PHAError: it cannot be read or is damaged; a record without the field, or with something
            else than text in it.
    """
    if kind_of(path).suffix == ".jsonl":
        for where, record in read_json_lines(path, meter):
            _require_field(where, field, record)
            yield _as_text(record[field], field, where)
        return
    yield from _texts_of(_parquet_batches(path, field), field, str(path), Meter())
    meter.add(size_of(path) or 0)


def read_json_lines(path: TextFile, meter: Meter) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object of a .jsonl file, compressed or not, after the words for where it stands.

    Raises:
        PHAError: it cannot be read or is damaged; a line that is no JSON object or too long.
    """
    with _open_bytes(path, meter) as file:
        for number, line in enumerate(iter(partial(file.readline, _LINE), b""), start=1):
            where = f"line {number} of {path}"
            if len(line) == _LINE:
                raise PHAError(f"{where} has more than {_LINE >> 20} MB: cut its text into records")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                record = parse_json(text)
            except UnicodeDecodeError as error:
                raise PHAError(f"{where} is not UTF-8: convert the file to UTF-8") from error
            except ValueError as error:
                raise PHAError(f"{where} is not JSON ({error}): correct or remove it") from error
            if not isinstance(record, dict):
                raise PHAError(f"{where} is not a JSON object: write {{..., ...}} on each line")
            yield where, record


def open_rows(place: str, config: str | None, where: str, **options: Any) -> Any:
    """Open a data set with `load_dataset`, as a stream of rows for each split.

    Raises:
        PHAError: `datasets` is not installed, or there is no such data set or configuration.
    """
    try:
        import datasets
    except ImportError as error:
        raise PHAError(f"reading {where} needs datasets: pip install 'pha-lm[data]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is told once, by us
    try:
        return datasets.load_dataset(place, config, streaming=True, **options)
    except Exception as error:  # of many kinds, from missing files to unknown configurations
        raise PHAError(
            f"{where} cannot be opened: {first_line(error)}; check its name or get it again"
        ) from error


def read_rows(rows: Any, field: str, where: str, meter: Meter) -> Iterator[str]:
    """Yield the text in a field of each row of a split that `open_rows` gave; `meter` counts rows.

    Raises:
        PHAError: as `read_records`, and whatever a network does.
    """

    def batches() -> Iterator[Mapping[str, Any]]:
        chosen = rows
        if rows.column_names is not None:
            _require_field(where, field, rows.column_names)
            chosen = rows.select_columns(field)
        yield from chosen.iter(batch_size=_ROWS)

    yield from _texts_of(batches(), field, where, meter)


def _parquet_batches(path: TextFile, field: str) -> Iterator[dict[str, list[Any]]]:
    """Rows of a .parquet file; memory holds a few megabytes of a row group, whatever its size."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise PHAError(f"reading {path} needs pyarrow: pip install 'pha-lm[data]'") from error
    with _open_bytes(path, Meter()) as file:
        rows = ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False)
        _require_field(str(path), field, rows.schema_arrow.names)
        for batch in rows.iter_batches(_ROWS, columns=[field]):
            yield batch.to_pydict()


def _texts_of(
    batches: Iterable[Mapping[str, Any]], field: str, where: str, meter: Meter
) -> Iterator[str]:
    """Yield the text in a field of each row of some batches; `meter` counts rows."""
    number = 0
    try:
        for batch in batches:
            _require_field(where, field, batch)
            for value in batch[field]:
                number += 1
                yield _as_text(value, field, f"row {number} of {where}")
            meter.add(len(batch[field]))
    except PHAError:
        raise
    except Exception as error:  # whatever the many formats and file systems raise
        raise PHAError(
            f"reading {where} failed after {number} rows ({first_line(error)}): "
            "get damaged files again, or check the network and start again"
        ) from error


def _require_field(where: str, field: str, present: Any) -> None:
    if field not in present:
        names = ", ".join(map(str, present)) or "none"
        raise PHAError(
            f"{where} has no field {field!r}: it has {names}; name the one with the text "
            "with --text-field"
        )


def _as_text(value: Any, field: str, where: str) -> str:
    """`value` if it is text that UTF-8 can write."""
    if not isinstance(value, str):
        kind = "nothing (null)" if value is None else type(value).__name__
        raise PHAError(
            f"field {field!r} in {where} is {kind}, not text: choose another field with "
            "--text-field, or remove the record"
        )
    return require_encodable(value, f"field {field!r} in {where}")


class _MeteredFile(io.FileIO):
    """A file on disk that tells how much of it has been read."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(path)
        self._count = count

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer) or 0
        self._count(size)
        return size


def _open_raw(path: TextFile, meter: Meter) -> io.RawIOBase:
    if isinstance(path, RemoteFile):
        return RemoteStream(path, meter.add)
    return _MeteredFile(path, meter.add)


@contextmanager
def _open_bytes(path: TextFile, meter: Meter) -> Iterator[IO[bytes]]:
    """Open a file, decompressing it where its name ends in .gz, .xz or .zst."""
    try:
        with io.BufferedReader(_open_raw(path, meter), _BUFFER) as raw:
            yield _decompressed(raw, kind_of(path).compression)
    except EOFError as error:
        raise PHAError(f"{path} is cut short: get the file again") from error
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise PHAError(f"{path} is damaged ({error}): get the file again") from error
    except MemoryError as error:
        raise PHAError(f"{path} takes more memory to unpack than there is") from error
    except OSError as error:
        reason = error.strerror or str(error)
        is_remote = isinstance(path, RemoteFile)
        remedy = "try again, or download it" if is_remote else "get the file again"
        raise PHAError(f"{path} cannot be read ({reason}): {remedy}") from error


def _decompressed(raw: Any, compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".xz":
        return lzma.LZMAFile(raw)
    if compression == ".zst":
        # Arrow's stream says when a frame is cut short; that of `zstandard` does not.
        try:
            import pyarrow as pa
        except ImportError as error:
            raise PHAError("reading .zst needs pyarrow: pip install 'pha-lm[data]'") from error
        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, _BUFFER)
    return raw
