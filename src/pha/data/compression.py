"""Compressed files as streams of bytes that say when they end too early."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pha.utils.errors import PHAError

COMPRESSIONS = frozenset({".gz", ".xz", ".zst"})

_CHUNK = 1 << 14
_ZSTD_WINDOW = 1 << 31  # archives made with --long need up to this much memory


class Stream:
    """A file opened for reading: `file` gives its decompressed bytes.

    `position` is the number of bytes read so far of the file as it is on disk.
    """

    def __init__(self, file: IO[bytes] | io.BufferedIOBase, raw: IO[bytes]) -> None:
        self.file = file
        self._raw = raw

    @property
    def position(self) -> int:
        """Bytes of the file on disk read so far."""
        return self._raw.tell()


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """Open a file, decompressing it where its name ends in .gz, .xz or .zst.

    Raises:
        PHAError: it cannot be read, or what is read inside the block is damaged or cut short.
    """
    try:
        with path.open("rb") as raw, _decompressed(raw, path.suffix.lower()) as file:
            yield Stream(file, raw)
    except EOFError as error:
        raise PHAError(f"{path} is cut short: get the file again") from error
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise PHAError(f"{path} is damaged ({error}): get the file again") from error
    except OSError as error:
        raise PHAError(f"{path} cannot be read ({error.strerror or error})") from error


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes] | io.BufferedIOBase:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstandardFile(raw), 1 << 20)
    return raw


class _ZstandardFile(io.RawIOBase):
    """Frames of Zstandard one after another; zstandard's own reader accepts a frame cut short."""

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise PHAError("reading .zst needs zstandard: pip install 'pha[data]'") from error
        self._module = zstandard
        self._raw = raw
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with decompressed bytes; 0 at the end of the last frame."""
        while not self._output:
            self._input = self._input or self._raw.read(_CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._decompress()
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self) -> None:
        if self._frame is None:
            decompressor = self._module.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
            self._frame = decompressor.decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._module.ZstdError as error:
            raise OSError(f"damaged, {error}") from error
        self._input = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
