"""Where text comes from: the standard library's own source, a text file, or a folder of text.

A source yields documents for each split. Which split a text belongs to depends only on the
source's own files, never on the tokenizer or a seed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pha.utils.errors import PHAError

SPLITS = ("train", "validation", "test")

_SPLIT_WORDS = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# No .py or .md here: train.py and test_plan.md are usually code and notes, not splits.
_SPLIT_FILE_SUFFIXES = frozenset({".txt", ".text", ".raw", ".tokens"})
_DOCUMENT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".py"})
_NOT_PLAIN_TEXT = frozenset({".json", ".jsonl", ".parquet", ".arrow", ".gz", ".xz", ".zip", ".zst"})
_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


@dataclass(frozen=True)
class Document:
    """One text: `name` says where it is from (unique in its source), `text` is kept unchanged."""

    name: str
    text: str


class Source(ABC):
    """A corpus in splits. Opening one lists files; texts are read when documents are asked for."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What the corpus is, in one line."""

    @property
    @abstractmethod
    def joins_documents(self) -> bool:
        """Whether a split is one running text, so that nothing is put between its documents."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """A hash that changes when the underlying files do (by name, size and date)."""

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The splits that have text, in the order of `SPLITS`; train and validation always do."""

    @abstractmethod
    def size(self, split: str) -> int | None:
        """UTF-8 bytes of a split's text, or None where that is not known beforehand."""

    @abstractmethod
    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of a split, in the same order every time.

        Raises:
            PHAError: no such split here, or a text that cannot be read as UTF-8.
        """


class FilesSource(Source):
    """Whole files as documents, each already given to a split."""

    def __init__(
        self,
        root: Path,
        files: Mapping[str, Sequence[Path]],
        description: str,
        *,
        joins_documents: bool,
    ) -> None:
        self._root = root
        self._files = files
        self._description = description
        self._joins_documents = joins_documents

    @property
    def description(self) -> str:
        """What the corpus is, in one line."""
        return self._description

    @property
    def joins_documents(self) -> bool:
        """Whether the files of a split are parts of one running text."""
        return self._joins_documents

    @property
    def identity(self) -> str:
        """A hash of every file's path, size and date."""
        files = (path for split in self.splits for path in self._files[split])
        return _identity(self._description, files)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have files."""
        return tuple(split for split in SPLITS if self._files.get(split))

    def size(self, split: str) -> int:
        """Bytes of the files of a split."""
        return sum(path.stat().st_size for path in self._of(split))

    def documents(self, split: str) -> Iterator[Document]:
        """Yield each file of the split as one document, byte for byte."""
        for path in self._of(split):
            name = path.relative_to(self._root).as_posix()
            yield Document(name, _decode(_read_bytes(path), path))

    def _of(self, split: str) -> Sequence[Path]:
        if split not in self.splits:
            raise PHAError(f"{self._root} has no {split} split: it has {', '.join(self.splits)}")
        return self._files[split]


class TextFileSource(Source):
    """One text file cut at line ends into the first 90%, the next 5% and the last 5% of its bytes.

    A cut is put at the end of the line that crosses 90% (95%) of the bytes.

    Raises:
        PHAError: the file is empty, or so short (or its lines so long) that a split would be empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        size = path.stat().st_size
        if size == 0:
            raise PHAError(f"{path} is empty")
        try:
            with path.open("rb") as file:
                cuts = []
                for percent in (90, 95):
                    file.seek(max(0, size * percent // 100 - 1))
                    file.readline()
                    cuts.append(file.tell())
        except OSError as error:
            raise PHAError(f"{path} cannot be read ({error.strerror})") from error
        bounds = [0, *cuts, size]
        if sorted(set(bounds)) != bounds:
            raise PHAError(
                f"{path} has too few lines to be cut 90/5/5 at line ends: use a longer file, "
                "or a folder with train.txt, valid.txt and test.txt"
            )
        self._ranges = dict(zip(SPLITS, pairwise(bounds), strict=True))

    @property
    def description(self) -> str:
        """What the corpus is, in one line."""
        return f"text file {self._path.name}, cut 90/5/5 at line ends"

    @property
    def joins_documents(self) -> bool:
        """Always: a split is one stretch of the file."""
        return True

    @property
    def identity(self) -> str:
        """A hash of the file's path, size and date."""
        return _identity(self.description, [self._path])

    @property
    def splits(self) -> tuple[str, ...]:
        """All three."""
        return SPLITS

    def size(self, split: str) -> int:
        """Bytes of the split's stretch of the file."""
        start, end = self._range(split)
        return end - start

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the split's stretch of the file as one document."""
        start, end = self._range(split)
        yield Document(self._path.name, _decode(_read_bytes(self._path, start, end), self._path))

    def _range(self, split: str) -> tuple[int, int]:
        if split not in self._ranges:
            raise PHAError(f"{self._path} has no {split} split: it has {', '.join(SPLITS)}")
        return self._ranges[split]


def open_source(spec: str) -> Source:
    """Open a corpus by name or path.

    Args:
        spec: `stdlib`, the path of a UTF-8 text file, or the path of a folder. In a folder, .txt,
            .text, .raw and .tokens files whose name holds one split word (train; valid,
            validation, val or dev; test; parted by `.` or `_`, as in wiki.valid.raw) are the
            splits as they stand. A folder without such files is read recursively: every .txt,
            .text, .md, .rst and .py file is a document, put into a split by a hash of its path.

    Raises:
        PHAError: nothing there, no text in it, or a split without text.
    """
    if spec in _NAMED_SOURCES:
        return _NAMED_SOURCES[spec]()
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        named = _split_named_files(path)
        return _split_files(path, named) if named else _document_folder(path)
    if not path.is_file():
        names = ", ".join(_NAMED_SOURCES)
        raise PHAError(f"no file or folder {spec!r}: give the path of some text, or one of {names}")
    if path.suffix.lower() in _NOT_PLAIN_TEXT:
        raise PHAError(f"{path} is not plain text: write its texts to .txt files first")
    return TextFileSource(path)


def hash_split(name: str) -> str:
    """The split of a document by the SHA-256 of its name: about 90% train, 5%, 5%.

    It depends on nothing else, so a document never moves when others come or go.
    """
    digest = hashlib.sha256(os.fsencode(name)).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"


def _standard_library() -> Source:
    """The running Python's own source text, without tests and third-party packages."""
    root = Path(sysconfig.get_path("stdlib"))
    version = f"{platform.python_implementation()} {platform.python_version()}"
    found = _text_files(root, frozenset({".py"}), _is_library_part) if root.is_dir() else []
    files = [path for path in found if _is_utf8(path)]
    if not files:
        raise PHAError(
            f"the standard library of {version} has no .py files in {root} (it may be zipped): "
            "give a text file or folder instead of stdlib"
        )
    description = f"standard library of {version}, {len(files)} files"
    return _hash_split_source(root, files, description)


def _is_library_part(name: str) -> bool:
    """Leave out tests, installed packages and what the build generated for this machine."""
    return name not in _NOT_LIBRARY and not name.startswith(("config-", "_sysconfigdata"))


def _split_named_files(folder: Path) -> dict[str, list[Path]]:
    """The folder's files that name exactly one split, by split."""
    named: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        words = _split_words(path)
        is_text = path.suffix.lower() in _SPLIT_FILE_SUFFIXES and not path.name.startswith(".")
        if is_text and len(words) == 1 and path.is_file():
            named.setdefault(_SPLIT_WORDS[words[0]], []).append(path)
    return named


def _split_words(path: Path) -> list[str]:
    return [word for word in re.split(r"[._]", path.stem.lower()) if word in _SPLIT_WORDS]


def _split_files(folder: Path, named: dict[str, list[Path]]) -> Source:
    for split, paths in named.items():
        # Several files are one split only as numbered parts; anything else may be the same text.
        if len({(path.suffix.lower(), *_split_words(path)) for path in paths}) > 1:
            names = ", ".join(path.name for path in paths)
            raise PHAError(
                f"{folder} has more than one variant of the {split} split ({names}): "
                "keep one of them in the folder"
            )
        if all(path.stat().st_size == 0 for path in paths):
            raise PHAError(f"the {split} split of {folder} is empty: put text into {paths[0].name}")
    for split, example in (("train", "train.txt"), ("validation", "valid.txt")):
        if split not in named:
            names = ", ".join(path.name for paths in named.values() for path in paths)
            raise PHAError(
                f"{folder} has files named for a split ({names}) but none for {split}: "
                f"name that file {example}"
            )
    files = ", ".join(path.name for split in SPLITS for path in named.get(split, []))
    return FilesSource(folder, named, f"folder {folder.name}: {files}", joins_documents=True)


def _document_folder(folder: Path) -> Source:
    files = _text_files(folder, _DOCUMENT_SUFFIXES, lambda name: True)
    if not files:
        kinds = " ".join(sorted(_DOCUMENT_SUFFIXES))
        raise PHAError(f"{folder} holds no text: no file there is non-empty and one of {kinds}")
    return _hash_split_source(folder, files, f"folder {folder.name}, {len(files)} files")


def _hash_split_source(root: Path, files: Iterable[Path], description: str) -> Source:
    by_split: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in files:
        by_split[hash_split(path.relative_to(root).as_posix())].append(path)
    for split, paths in by_split.items():
        if not paths:
            raise PHAError(
                f"{root} has too few files: none falls into the {split} split; add files, "
                "or name them train.txt, valid.txt and test.txt"
            )
    return FilesSource(root, by_split, description, joins_documents=False)


def _text_files(root: Path, suffixes: frozenset[str], keep: Callable[[str], bool]) -> list[Path]:
    """Non-empty files below `root`, sorted by relative path.

    Hidden names and those `keep` refuses are left out, and so are links that lead out of `root`.
    """
    inside = root.resolve()
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and keep(name)]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not keep(name) or path.suffix.lower() not in suffixes:
                continue
            if not path.is_file() or path.stat().st_size == 0:
                continue
            if not path.is_symlink() or path.resolve().is_relative_to(inside):
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _refuse(error: OSError) -> None:
    raise PHAError(f"{error.filename} cannot be read ({error.strerror})") from error


def _read_bytes(path: Path, start: int = 0, end: int | None = None) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)
    except OSError as error:
        raise PHAError(f"{path} cannot be read ({error.strerror})") from error


def _decode(data: bytes, path: Path) -> str:
    """Decode without touching line ends or a byte order mark."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PHAError(f"{path} is not UTF-8 text: convert it to UTF-8 or leave it out") from error


def _is_utf8(path: Path) -> bool:
    try:
        _decode(_read_bytes(path), path)
    except PHAError:
        return False
    return True


def _identity(description: str, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(os.fsencode(description))
    for path in files:
        stat = path.stat()
        digest.update(os.fsencode(f"\0{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}"))
    return digest.hexdigest()


_NAMED_SOURCES: dict[str, Callable[[], Source]] = {"stdlib": _standard_library}
