"""Where output goes: settled before any work, held while it is written, nobody else's touched."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pha.utils.errors import PHAError, is_out_of_memory
from pha.utils.files import followed, remove_leftovers
from pha.utils.formats import require_encodable


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in a line why `path` cannot be written."""
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise
        reason = str(error.strerror or error)
        if error.filename not in (None, str(path)):
            reason = f"{error.filename}: {reason}"
        raise PHAError(f"{path} cannot be written ({reason})") from error


def require_folder(path: Path, *, replaced: bool = False) -> None:
    """Refuse an output folder that cannot be made or written. A link to a folder is followed.

    Args:
        path: of the folder, which need not exist.
        replaced: whether it appears whole, by renaming, in the folder around it.

    Raises:
        PHAError: it, or what it would lie in, is no folder or cannot be written; or its name is not
            UTF-8, which safetensors and tokenizers cannot write to.
    """
    require_encodable(str(path.absolute()), f"the name of the folder {path}")
    with writing(path):
        _require_no_dead_link(path)
        if path.exists() and not path.is_dir():
            raise PHAError(f"{path} is a file or a device; name a folder")
        place = followed(path)
        if replaced:
            if place.exists() and (os.path.ismount(place) or place.samefile(Path.cwd())):
                raise PHAError(f"{path} cannot be replaced as a whole; name a folder inside it")
            place = place.parent
        _require_writable(path, place)


def require_new_folder(path: Path) -> None:
    """Refuse an output folder as `require_folder` does, or because something is in it.

    Raises:
        PHAError: it cannot be made or written, or is not empty.
    """
    require_folder(path, replaced=True)
    if path.exists() and any(path.iterdir()):
        raise PHAError(f"{path} is not empty; choose another folder")


def require_file(path: Path | None) -> None:
    """Refuse an output file that cannot be written; None is no output.

    A link is followed. Pipes and devices that take text are written to.

    Raises:
        PHAError: it is a folder, a disk or a socket, or cannot be written.
    """
    if path is None:
        return
    with writing(path):
        if path.exists():
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise PHAError(f"{path} is a folder: name the file to write")
            if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
                raise PHAError(f"{path} is a disk or a socket: name a file")
            if not os.access(path, os.W_OK):
                raise PHAError(f"{path} may not be written: name another file")
            if not stat.S_ISREG(mode):
                return
        place = followed(path)
        # A link may lead to a file that does not exist yet.
        _require_no_dead_link(place if place.parent.is_dir() else path)
        _require_writable(path, place.parent)
        remove_leftovers(place.parent, place.name)


def require_own(record: Path, *beside: Path) -> None:
    """Refuse to replace a JSON record, and the files `beside` that belong to it, of somebody else.

    Raises:
        PHAError: `record` is there and is not ours, or is absent while one of the others is there.
    """
    try:
        content = json.loads(record.read_bytes())
    except FileNotFoundError:
        theirs = next((path for path in beside if os.path.lexists(path)), None)
    except (OSError, ValueError, RecursionError):
        theirs = record
    else:
        marks = {"provenance", "summarised"}
        theirs = None if isinstance(content, dict) and marks & content.keys() else record
    if theirs is not None:
        raise PHAError(
            f"{theirs} is not of an earlier call and would be lost; choose another --out"
        )


def require_outputs(folder: Path | None, record: str, *beside: str) -> None:
    """Refuse a folder for these files, as `require_folder` and `require_own` do; None is no output.

    Raises:
        PHAError: it cannot be written, or they are of somebody else.
    """
    if folder is not None:
        require_folder(folder)
        require_own(folder / record, *(folder / name for name in beside))


@contextmanager
def hold(lock: Path, refusal: Callable[[], str], wait: bool = False) -> Iterator[bool]:
    """Hold a lock file meanwhile; yields whether it is held.

    The system holds the lock, not the file: it ends with this process, however that ends. On a file
    system without locks there is none.

    Raises:
        PHAError: another process holds it, in the words of `refusal`; never with `wait`.
    """
    from filelock import FileLock, Timeout  # an extra, which loading a model does not need

    taken = FileLock(lock)
    try:
        taken.acquire(blocking=wait)
    except Timeout as error:
        raise PHAError(refusal()) from error
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        taken.release()


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep an output that will appear whole from other processes meanwhile.

    What killed ones left beside it is removed first.

    Raises:
        PHAError: another process is writing it, unless that is to be waited for; or it cannot be
            written.
    """
    place = followed(path)
    lock = place.with_name(f".{place.name}.lock")
    with ExitStack() as held, writing(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        refusal = f"{path} is being written by another process; let it finish, or choose another"
        is_held = held.enter_context(hold(lock, lambda: refusal, wait))
        if is_held:
            held.callback(_remove, lock)  # while it is held
        remove_leftovers(place.parent, place.name, held=is_held)
        yield


def _remove(lock: Path) -> None:
    with suppress(OSError):  # which would hide what went wrong before
        lock.unlink()


def _require_no_dead_link(path: Path) -> None:
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise PHAError(f"{each} is a link that leads nowhere: make its folder, or name another")


def _require_writable(path: Path, folder: Path) -> None:
    """Try whether files can be made in `folder`, or in the nearest one around it that exists."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise PHAError(f"{path} cannot be written: {folder} is no folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PHAError(f"{path} cannot be written: {folder}: {error.strerror or error}") from error
