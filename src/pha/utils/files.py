"""Files that are either whole or absent: write under a temporary name, flush to disk, rename."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pha.utils.errors import PHAError
from pha.utils.formats import to_json


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in one step (readers see the old file or the new one).

    A link to a file stays, and its file is replaced. A pipe or a device is written to.
    """
    if is_standard_output(path):
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    if path.exists() and not path.is_file():
        with _writer(path) as stream:
            stream.write(text)
        return
    with atomic_file(path) as temporary, _writer(temporary) as file:
        file.write(text)


def _writer(path: Path) -> IO[str]:
    # Half a surrogate pair stands for a byte of a file's name that is not UTF-8.
    # Line ends are those of the text on every system, or it would be another text.
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="")


def is_standard_output(path: Path) -> bool:
    """Whether a path, such as /dev/stdout, is where standard output goes."""
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name; the file written there becomes `path` when the block ends.

    After an exception nothing is left behind.
    """
    path = followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; what is no finite number becomes null."""
    write_text(path, to_json(value, indent=2) + "\n")


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, on file systems where a folder can be flushed."""
    with suppress(OSError):
        _fsync(folder)


def _fsync(path: Path) -> None:
    # Windows flushes no folder, and a file only to who may write it.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def followed(path: Path) -> Path:
    """Where a path leads, links followed; the absolute path."""
    return Path(os.path.realpath(path))


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an exception.

    An existing `path` is replaced only then; after an exception nothing is left behind. A link to a
    folder stays, and its folder is replaced. All files get the modes that the umask gives, and are
    on disk before they are seen.

    Raises:
        OSError: also where a library that wrote into the folder said it in another way.
    """
    path = followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        # Some libraries let only the owner read what they write.
        mode = temporary.stat().st_mode & 0o666
        for entry in temporary.rglob("*"):
            if entry.is_file():
                entry.chmod(mode)
                _fsync(entry)
            else:
                fsync_folder(entry)
        fsync_folder(temporary)
        # Two renames, so that no moment is long enough to lose both the old and the new.
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        fsync_folder(path.parent)
        fsync_folder(path.parent.parent)
    except Exception as error:
        reason = _os_error_in(error)
        if reason is None or isinstance(error, OSError | PHAError):
            raise
        raise reason from error
    finally:
        _put_back(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, path: Path) -> None:
    """Undo the first of the two renames where the second did not come."""
    if old.exists() and not path.exists():
        old.rename(path)


# Errors of writing that libraries in other languages report by number, in a message.
_WRITE_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO}


def _os_error_in(error: BaseException | None) -> OSError | None:
    """The failure to write that is the reason of an error, if it is one."""
    while error is not None:
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else said and int(said[1])
        if number in _WRITE_ERRORS:
            return OSError(number, os.strerror(number))
        error = error.__context__
    return None


def remove_folder(path: Path) -> None:
    """Delete a folder such that it is gone at once, never there in part."""
    gone = _beside(path, "gone")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


_LEFT = re.compile(r"\.(?P<host>.+)-(?P<process>\d+)\.(?P<ending>tmp|old|gone)\.(?P<name>.+)")


def remove_leftovers(
    folder: Path, name: str | None = None, *, held: bool = False, elsewhere: bool = False
) -> None:
    """Remove what processes that were killed left in `folder`, a replaced folder put back.

    Args:
        folder: where the outputs are; it may be absent.
        name: of one output; None for all.
        held: whether no other process of this host can be writing these outputs now; otherwise only
            those that have ended are cleared up after.
        elsewhere: whether the same holds for other hosts.
    """
    import psutil  # an extra, which loading a model does not need

    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        match = _LEFT.fullmatch(entry.name)
        if match is None or name not in (None, match["name"]):
            continue
        here = match["host"] == platform.node()
        if not (here and (held or not psutil.pid_exists(int(match["process"])))) and not elsewhere:
            continue
        if match["ending"] == "old":
            _put_back(entry, entry.with_name(match["name"]))
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    """A name beside `path` that no other process uses, on this host or another."""
    return path.with_name(f".{platform.node()}-{os.getpid()}.{ending}.{path.name}")


def copy_folder(source: Path, target: Path) -> None:
    """Make `target` a copy of the folder `source`, atomically; files are shared where they can be.

    Nothing in the package changes a file in place, so a hard link is as good as a copy.
    """

    def link_or_copy(old: str, new: str) -> str:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)
        return new

    with atomic_folder(target) as folder:
        shutil.copytree(source, folder, copy_function=link_or_copy, dirs_exist_ok=True)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where prepared token stores are kept: `$PHA_CACHE`, else `pha` in the user's cache folder.

    Raises:
        PHAError: neither says where, and the user has no home folder.
    """
    if chosen := os.environ.get("PHA_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pha"
    except RuntimeError as error:
        raise PHAError(
            "there is no home folder to keep prepared texts in: set PHA_CACHE to a folder"
        ) from error


def user_path(text: str) -> Path:
    """A path that a user wrote, which may begin with `~`; one of nobody stands for itself."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)
