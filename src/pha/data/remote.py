"""Files behind a URL, such as s3:// or https://, read as a stream through fsspec."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from pha.utils.errors import PHAError


@dataclass(frozen=True)
class RemoteFile:
    """A file of an fsspec file system; what a `Path` says of a file on disk, this says of it.

    Attributes:
        url: in full.
        path: what its file system calls it.
        system: the file system.
        info: what that tells of the file.
    """

    url: str
    path: str
    system: Any = field(compare=False)
    info: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        return shown_url(self.url)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return PurePosixPath(str(self)).name

    @property
    def parent(self) -> PurePosixPath:
        """What is before it."""
        return PurePosixPath(str(self)).parent


TextFile: TypeAlias = Path | RemoteFile


class RemoteStream(io.RawIOBase):
    """The bytes of a remote file, of which memory holds a few megabytes.

    Whatever a network does is an OSError here, and so is a file that ends before its end.

    Args:
        file: to read.
        count: told how many bytes came.
    """

    def __init__(self, file: RemoteFile, count: Callable[[int], None]) -> None:
        self._remote, self._count, self._size = file, count, size_of(file)
        self._file: Any = None
        self._is_whole = False
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file; a server without ranges is met by the next `readinto`."""
        position = offset + (0, self._position, self._size or 0)[whence]
        if self._file is not None and position != self._position:
            if self._is_whole:
                self._file = self._file.close()
            else:
                self._file.seek(position)
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """As of any file."""
        data = _tried(lambda: self._opened().read(len(buffer)))
        if not data and self._position < (self._size or 0):
            raise OSError(f"it ends after {self._position} of {self._size} bytes")
        buffer[: len(data)] = data
        self._position += len(data)
        self._count(len(data))
        return len(data)

    def close(self) -> None:
        """As of any file."""
        if self._file is not None:
            self._file = self._file.close()
        super().close()

    def _opened(self) -> Any:
        if self._file is None:
            # From its beginning on, a web server sends a file in one answer, ranges or not.
            self._is_whole = self._position == 0 and self._remote.url.startswith("http")
            options = {"block_size": 0} if self._is_whole else {}
            self._file = self._remote.system.open(self._remote.path, "rb", **options)
            if not self._is_whole:
                self._file.seek(self._position)
        return self._file


def find_remote(spec: str) -> list[RemoteFile]:
    """The file of a URL, or those that a pattern, a URL with `*`, matches.

    Raises:
        PHAError: a protocol that is unknown or whose package is not installed; no answer.
    """
    from fsspec.core import url_to_fs

    protocol = spec.partition("://")[0]
    try:
        system, path = url_to_fs(spec)
        if "*" in path:
            found = dict(system.glob(path, detail=True))
        else:
            found = {path: system.info(path)}
        return [
            # A listing of a web server tells names alone.
            RemoteFile(url, name, system, info if info.get("size") else system.info(name))
            for name, info in found.items()
            if info["type"] == "file"
            for url in [spec if name == path else system.unstrip_protocol(name)]
        ]
    except FileNotFoundError:
        return []
    except ImportError as error:
        raise PHAError(
            f"reading {protocol}:// needs a package that is not installed ({first_line(error)}): "
            "install it with pip"
        ) from error
    except Exception as error:  # file systems have no common class for what a network does
        raise PHAError(
            f"{shown_url(spec)} cannot be opened ({first_line(error)}): check the address, the "
            "network and your rights there"
        ) from error


def size_of(file: TextFile) -> int | None:
    """Bytes of a file as it lies there; None where its server does not tell."""
    if isinstance(file, RemoteFile):
        size = file.info.get("size")
        return None if size is None else int(size)
    return file.stat().st_size


def version_of(file: TextFile) -> str:
    """Where a file is, and what changes when it does: size and date, or what its server tells."""
    if isinstance(file, RemoteFile):
        told = sorted((key, str(value)) for key, value in file.info.items() if value != file.url)
        return f"{file}\0{told}"
    stat = file.stat()
    return f"{file.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}"


def shown_url(spec: str) -> str:
    """A URL without what gives access: a name and password, or the signature of an https URL."""
    if "://" not in spec:
        return spec
    shown = re.sub(r"://[^/@]*@", "://", spec)
    return shown.partition("?")[0] if shown.startswith("http") else shown


def first_line(error: Exception) -> str:
    """What an error of a library says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _tried(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except OSError:
        raise
    except Exception as error:  # file systems have no common class for what a network does
        raise OSError(first_line(error).partition(". ")[0]) from error
