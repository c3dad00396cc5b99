from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pha.data import SPLITS
from pha.data.files import text_files
from pha.data.readers import Meter
from pha.data.sources import open_source
from pha.utils.errors import PHAError
from tests.data.conftest import Refuses


def texts(spec: Path | str, split: str | None = None) -> list[str]:
    return [document.text for document in open_source(str(spec)).documents(split)]


def test_folder_of_documents(document_folder: Path, tmp_path: Path) -> None:
    (document_folder / "sub").mkdir()
    (document_folder / "sub" / "deep.rst").write_bytes(b"\xef\xbb\xbfdeep\r\n")
    (document_folder / "train.py").write_text("code, not a split")
    (document_folder / "test_plan.md").write_text("a note, not a split")
    (document_folder / "empty.txt").touch()
    (document_folder / "picture.png").write_text("not a text's name")
    (document_folder / ".hidden.txt").write_text("hidden")
    (document_folder / ".git").mkdir()
    (document_folder / ".git" / "log.txt").write_text("hidden")
    (tmp_path / "outside.txt").write_text("outside")
    (document_folder / "link.txt").symlink_to(tmp_path / "outside.txt")

    expected = [f"document number {number}\nends here\n" for number in range(100)]
    expected += ["deep\r\n", "code, not a split", "a note, not a split", "outside"]
    assert sorted(texts(document_folder)) == sorted(expected)
    source = open_source(str(document_folder))
    assert not source.joins_documents
    assert "104 files" in source.description
    assert source.split_rule["rule"] == "hash of the path"


def test_links_are_followed_and_each_file_is_read_once(
    document_folder: Path, tmp_path: Path, refuses: Refuses
) -> None:
    before = texts(document_folder)
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "deep" / "new.txt").write_text("new")
    (tmp_path / "more" / "circle").symlink_to(document_folder)
    (document_folder / "more").symlink_to(tmp_path / "more")
    (document_folder / "again").symlink_to("more/deep")
    (document_folder / ".store").mkdir()
    (document_folder / ".store" / "5f3a").write_text("kept under a hash")
    (document_folder / "named.txt").symlink_to(".store/5f3a")
    (document_folder / "0.txt").symlink_to("named.txt")
    assert sorted(texts(document_folder)) == sorted([*before, "new", "kept under a hash"])
    own = {path.name for path in text_files(document_folder, lambda path: path.suffix == ".txt")}
    assert {f"doc-{number}.txt" for number in range(100)} <= own
    (document_folder / "broken.txt").symlink_to(tmp_path / "nothing.txt")
    with refuses("broken.txt", "leads to nothing"):
        texts(document_folder)


def test_folder_with_too_few_documents(tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "doc-0.txt").write_text("train alone")
    with refuses(str(tmp_path), "too few lines", "train.txt"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
        ("my_TRAIN.text", "my_dev.text", "my_test.text"),
        ("train.1.tokens", "val.tokens", "test.tokens"),
    ],
)
def test_files_named_for_splits_are_the_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "README.md").write_text("about this data")
    for name in names:
        (tmp_path / name).write_bytes(f" = {name} = \r\n \n".encode())
    source = open_source(str(tmp_path))
    assert source.splits == SPLITS
    assert source.joins_documents
    for split, name in zip(SPLITS, names, strict=True):
        assert texts(tmp_path, split) == [f" = {name} = \r\n \n"]


def test_splits_that_are_missing(split_folder: Path, refuses: Refuses) -> None:
    (split_folder / "test.txt").unlink()
    source = open_source(str(split_folder))
    assert source.splits == ("train", "validation")
    with refuses("no test split", "train, validation"):
        list(source.documents("test"))
    (split_folder / "valid.txt").write_text("")
    with refuses("validation", "empty", "valid.txt"):
        open_source(str(split_folder))
    (split_folder / "valid.txt").unlink()
    with refuses("none for validation", "valid.txt"):
        open_source(str(split_folder))
    (split_folder / "train.txt").rename(split_folder / "valid.txt")
    with refuses("none for train", "train.txt"):
        open_source(str(split_folder))


def test_text_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {number} é\r\n" for number in range(100)]
    path = tmp_path / "text.txt"
    path.write_bytes("".join(lines).encode())
    source = open_source(str(path))
    parts = [text for split in SPLITS for text in texts(path, split)]
    assert "".join(parts) == "".join(lines)
    assert [len(part.splitlines()) for part in parts] == [91, 4, 5]
    assert source.joins_documents
    assert [(d.split, d.text) for d in source.documents()] == list(zip(SPLITS, parts, strict=True))


@given(st.lists(st.integers(0, 30), max_size=60))
def test_text_file_is_partitioned_or_refused(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    text = "\n".join("x" * length for length in lengths)
    path.write_text(text)
    try:
        parts = texts(path)
    except PHAError:
        # Above this size no 5% fits into one line of at most 31 bytes.
        assert len(text) < 20 * 32
        return
    assert "".join(parts) == text
    assert all(parts)
    assert parts[0].endswith("\n")
    assert parts[1].endswith("\n")
    assert len(parts[0]) >= len(text) * 9 // 10


@pytest.mark.parametrize("text", ["one line and no end", "a\nb\n", "x" * 1000 + "\n"])
def test_text_file_too_short_to_cut(tmp_path: Path, text: str, refuses: Refuses) -> None:
    path = tmp_path / "short.txt"
    path.write_text(text)
    with refuses("short.txt", "too few lines"):
        open_source(str(path))


def test_sources_that_are_not_there(tmp_path: Path, refuses: Refuses) -> None:
    with refuses("no file or folder", "nowhere", "stdlib"):
        open_source(str(tmp_path / "nowhere"))
    with refuses("no file or folder"):
        open_source("")
    with refuses("holds no text", ".txt"):
        open_source(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with refuses("empty"):
        open_source(str(tmp_path / "empty.txt"))
    for name in ("rows.json", "rows.csv.gz", "texts.zip", "text.md.xz"):
        (tmp_path / name).write_text("text\n" * 100)
        with refuses(name, "not a kind of text", ".jsonl"):
            open_source(str(tmp_path / name))


@pytest.fixture
def fake_library(document_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The document folder turned into a standard library of .py files."""
    for path in document_folder.iterdir():
        path.rename(path.with_suffix(".py"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(document_folder))
    return document_folder


def test_stdlib_leaves_out_what_is_not_the_library(fake_library: Path) -> None:
    for name in (
        "site-packages/torch.py",
        "json/tests/test_json.py",
        "test/regrtest.py",
        "idlelib/idle_test/mock.py",
        "__pycache__/os.py",
        "config-3.11-linux/python-config.py",
        "_sysconfigdata_linux.py",
        "encodings/README.txt",
    ):
        (fake_library / name).parent.mkdir(parents=True, exist_ok=True)
        (fake_library / name).write_text("left out")
    (fake_library / "latin.py").write_bytes(b"# caf\xe9")
    (fake_library / "json" / "decoder.py").write_text("kept")
    source = open_source("stdlib")
    found = [document.text for document in source.documents()]
    assert [text for text in found if not text.startswith("document number")] == ["kept"]
    assert "101 files" in source.description


def test_stdlib_without_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with refuses("standard library", "python311.zip"):
        open_source("stdlib")


def test_stdlib_of_this_python() -> None:
    source = open_source("stdlib")
    validation = texts("stdlib", "validation")
    assert source.splits == SPLITS
    assert source.description.startswith("standard library of ")
    assert not source.joins_documents
    assert Path(sysconfig.get_path("stdlib"), "os.py").read_text("utf-8") in validation
    meter = Meter()
    assert sum(len(document.text) for document in source.documents("train", meter)) > 4_000_000
    assert meter.done == meter.total


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, pha_command\n"
        "import pha.data\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'datasets', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n"
