from __future__ import annotations

from pathlib import Path

import pytest

from pha.runs import RunFolder
from pha.utils.errors import PHAError
from pha.utils.files import atomic_folder, cache_folder, write_json
from pha.utils.formats import read_json


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made" / "here"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(OSError, match="missing"), atomic_folder(target) as folder:
        (folder / "missing" / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    with atomic_folder(target) as folder:
        (folder / "b").write_text("3")
    assert [f.name for f in target.iterdir()] == ["b"]
    assert [f.name for f in target.parent.iterdir()] == ["here"]


@pytest.mark.parametrize("refused", [1, 2])
def test_a_folder_stays_where_the_new_one_cannot_be_renamed(
    refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "here"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    renames, rename = 0, Path.rename

    def failing(path: Path, to: Path) -> Path:
        nonlocal renames
        renames += 1
        assert any((each / "a").is_file() for each in tmp_path.iterdir())  # the old one, somewhere
        if renames == refused:
            raise OSError("no rename")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no rename"), atomic_folder(target) as folder:
        (folder / "b").write_text("new")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_stays_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_json(path, 1)

    def failing(_: Path, __: Path) -> None:
        assert read_json(path) == 1
        raise OSError("no replacement")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="no replacement"):
        write_json(path, 2)
    assert read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"ä": [1.5, None]})
    assert read_json(path) == {"ä": [1.5, None]}
    path.write_text("{")
    with pytest.raises(PHAError, match=r"x\.json cannot be read as JSON"):
        read_json(path)
    with pytest.raises(PHAError, match="does not exist"):
        read_json(tmp_path / "y.json")


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PHA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pha"


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("step-3", "step-20", ".step-30.7.tmp", "step-x", "other"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.checkpoint_steps() == [3, 20]
