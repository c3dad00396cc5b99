"""Files that are either whole or absent: write under a temporary name, flush to disk, rename."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pha.utils.errors import PHAError
from pha.utils.formats import to_json


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in one step (readers see the old file or the new one)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Half a surrogate pair stands for a byte of a file's name that is not UTF-8.
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; what is no finite number becomes null."""
    write_text(path, to_json(value, indent=2) + "\n")


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable (a no-op where folders cannot be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an exception.

    An existing `path` is replaced only then; after an exception nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        # Two renames, so that no moment is long enough to lose both the old and the new.
        old = _beside(path, "old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what `atomic_folder(path)` left behind in processes of this host that were killed."""
    import psutil  # an extra, which loading a model does not need

    name = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(platform.node())}-(\d+)\.(tmp|old)")
    if not path.parent.is_dir():
        return
    for folder in path.parent.iterdir():
        match = name.fullmatch(folder.name)
        if match and not psutil.pid_exists(int(match.group(1))):
            shutil.rmtree(folder, ignore_errors=True)


def _beside(path: Path, ending: str) -> Path:
    """A name beside `path` that no other process uses, on this host or another."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.{ending}")


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
