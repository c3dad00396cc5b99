"""Where output goes: what is refused before any work, followed, held, and left alone."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pha.utils.errors import PHAError
from pha.utils.files import atomic_folder, remove_leftovers, write_json, write_text
from pha.utils.outputs import (
    claimed,
    require_file,
    require_folder,
    require_new_folder,
    require_own,
    writing,
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file, links, a pipe and a socket; also the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "real").mkdir()
    for name, target in (("link", "real"), ("nowhere", "absent/x"), ("a", "b"), ("b", "a")):
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("file", "is a file or a device"),
        ("/dev/null", "is a file or a device"),
        ("pipe", "is a file or a device"),
        ("nowhere", "is a link that leads nowhere"),
        ("a", "is a link that leads nowhere"),
        ("file/run", "file is no folder"),
        ("nowhere/run", "is a link that leads nowhere"),
        ("a/run", "is a link that leads nowhere"),
        ("/proc/run", "cannot be written"),
        ("x" * 300, "cannot be written"),
    ],
)
def test_what_cannot_be_a_folder_is_refused(place: Path, name: str, expected: str) -> None:
    before = sorted(place.iterdir())
    with pytest.raises(PHAError, match=expected) as error:
        require_folder(Path(name))
    assert "\n" not in str(error.value)
    assert sorted(place.iterdir()) == before


def test_what_can_be_a_folder_is_left_as_it_is(place: Path) -> None:
    before = sorted(place.rglob("*"))
    for name in ("new", "new/er", "real", "link", "link/new", "."):
        require_folder(Path(name))
    require_folder(Path("link"), replaced=True)
    with pytest.raises(PHAError, match="cannot be replaced as a whole"):
        require_folder(Path(), replaced=True)
    require_new_folder(Path("link"))
    (place / "real" / "theirs").touch()
    with pytest.raises(PHAError, match="is not empty"):
        require_new_folder(Path("link"))
    (place / "real" / "theirs").unlink()
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["real", "link", "socket", "file/x", "nowhere", "nowhere/x", "a", "a/x", "/proc/x"]
)
def test_what_cannot_be_a_file_is_refused(place: Path, name: str) -> None:
    with pytest.raises(PHAError) as error:
        require_file(Path(name))
    assert "\n" not in str(error.value)


def test_links_stay_and_pipes_and_devices_are_written_to(place: Path) -> None:
    (place / "to-file").symlink_to("file")
    (place / "to-new").symlink_to("new")
    for name in ("to-file", "to-new", "pipe", "/dev/null", "plain"):
        require_file(Path(name))
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("to-file", "to-new", "pipe", "/dev/null"):
        write_text(Path(name), "ours")
    assert os.read(reader, 10) == b"ours"
    os.close(reader)
    assert (place / "to-file").is_symlink()
    assert (place / "file").read_text() == (place / "new").read_text() == "ours"
    assert Path("pipe").is_fifo()
    assert Path("/dev/null").is_char_device()
    with atomic_folder(Path("link")) as folder:
        (folder / "x").touch()
    assert (place / "link").is_symlink()
    assert (place / "real" / "x").is_file()


def test_a_failure_to_write_names_path_and_reason(place: Path) -> None:
    with pytest.raises(PHAError, match=r"^out cannot be written \(No space"), writing(Path("out")):
        write_text(Path("/dev/full"), "x")


def test_only_our_own_records_are_replaced(place: Path) -> None:
    record, picture = place / "x.json", place / "x.svg"
    require_own(record, picture)
    picture.touch()
    with pytest.raises(PHAError, match=r"x\.svg is not of an earlier call"):
        require_own(record, picture)
    write_json(record, {"provenance": {}})
    require_own(record, picture)
    for theirs in ('{"a": 1}', "[1]", "text", "[" * 100_000):
        record.write_text(theirs)
        with pytest.raises(PHAError, match=r"x\.json is not of an earlier call"):
            require_own(record, picture)


def test_a_second_process_is_refused_and_leftovers_are_removed(place: Path) -> None:
    out = place / "out"
    left = [f".{os.uname().nodename}-1.{ending}.out" for ending in ("tmp", "gone")]
    for name in left:
        (place / name).mkdir()
    before = {path.name for path in place.iterdir()} - set(left)
    with claimed(out):
        with pytest.raises(PHAError, match="is being written by another process"), claimed(out):
            pass
        with atomic_folder(out) as folder:
            (folder / "x").touch()
    assert {path.name for path in place.iterdir()} == before | {"out"}


def test_a_folder_is_put_back_where_its_replacement_did_not_come(place: Path) -> None:
    out = place / "out"
    host = os.uname().nodename
    old = place / f".{host}-4194305.old.out"  # a number that no process has
    old.mkdir()
    (old / "x").touch()
    remove_leftovers(place)
    assert (out / "x").is_file()
    old.mkdir()
    (place / f".{host}-4194305.tmp.file").touch()
    remove_leftovers(place)
    assert (out / "x").is_file()
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
