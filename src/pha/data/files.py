"""Corpora in files: one text, a folder, or a pattern; plain, compressed or in records."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any

from pha.data.documents import (
    SPLITS,
    Document,
    Meter,
    Source,
    SourceFacts,
    given_and_held_out,
    hold_out,
    splits_to_read,
)
from pha.data.options import SourceOptions
from pha.data.readers import (
    DOCUMENT_TEXT,
    KINDS,
    RUNNING_TEXT,
    kind_of,
    read_records,
    read_text,
    stem_of,
)
from pha.data.splits import SPLIT_WORDS, TextSplit, natural_order, path_split, split_word
from pha.utils.errors import PHAError

HOLDOUT = Fraction(5, 100)

_LISTED = 8  # file names in a description
_BY_NAME = {"rule": "files named for their split"}
_BY_PATH = {
    "rule": "hash of the path",
    "fractions": {"train": "9/10", "validation": "1/20", "test": "1/20"},
}
_BY_POSITION = {
    "rule": "position in the file, at line ends",
    "fractions": {"train": "9/10", "validation": "1/20", "test": "1/20"},
}


class FilesSource(Source):
    """Files of text or records, each already given to a split or to be split by documents.

    Args:
        root: folder that documents are named from.
        files: paths of each split.
        description: in one line.
        rule: how the files were given to splits, ready for JSON, or the rule that holds
            documents out of the train files.
        text_field: of records.
    """

    def __init__(
        self,
        root: Path,
        files: Mapping[str, Sequence[Path]],
        description: str,
        rule: Mapping[str, Any] | TextSplit,
        *,
        joins_documents: bool,
        text_field: str = "text",
    ) -> None:
        self._root = root
        self._files = files
        self._held_out = rule if isinstance(rule, TextSplit) else None
        self._text_field = text_field
        split_rule = rule.describe() if isinstance(rule, TextSplit) else dict(rule)
        given = [split for split in SPLITS if files.get(split)]
        paths = [path for split in given for path in files[split]]
        super().__init__(
            SourceFacts(
                description=description,
                identity=files_identity([description, text_field, str(split_rule)], paths),
                splits=given_and_held_out(given, self._held_out),
                joins_documents=joins_documents,
                split_rule=split_rule,
            )
        )

    def documents(self, split: str | None = None, meter: Meter | None = None) -> Iterator[Document]:
        """Yield every file, or record of a file, as a document."""
        meter = meter or Meter()
        wanted = splits_to_read(self, self._files, self._held_out, split)
        meter.done, meter.total = 0, sum(_size(p) for name in wanted for p in self._files[name])
        for name in wanted:
            for path in self._files[name]:
                before = meter.done
                for document in hold_out(self._read(path, name, meter), self._held_out):
                    if split in (None, document.split):
                        yield document
                meter.done = before + _size(path)

    def _read(self, path: Path, split: str, meter: Meter) -> Iterator[Document]:
        name = path.relative_to(self._root).as_posix()
        before = meter.done

        def advance(done: int) -> None:
            meter.done = before + done

        if kind_of(path).is_records:
            for number, text in read_records(path, self._text_field, advance):
                yield Document(f"{name}:{number}", split, (text,))
        else:
            yield Document(name, split, read_text(path, advance))


class TextFileSource(Source):
    """One text file cut at line ends into the first 90%, the next 5% and the last 5% of its bytes.

    A cut is put at the end of the line that crosses 90% (95%) of the bytes.

    Raises:
        PHAError: the file is empty, or so short (or its lines so long) that a split would be empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        description = f"text file {path.name}, cut 90/5/5 at line ends"
        bounds = _cut_at_line_ends(path)
        self._ranges = dict(zip(SPLITS, pairwise(bounds), strict=True))
        super().__init__(
            SourceFacts(
                description=description,
                identity=files_identity([description], [path]),
                splits=SPLITS,
                joins_documents=True,
                split_rule=_BY_POSITION,
            )
        )

    def documents(self, split: str | None = None, meter: Meter | None = None) -> Iterator[Document]:
        """Yield each split's stretch of the file as one document."""
        meter = meter or Meter()
        ranges = {name: self._ranges[name] for name in splits_to_read(self, SPLITS, None, split)}
        meter.done, meter.total = 0, sum(end - start for start, end in ranges.values())
        for name, (start, end) in ranges.items():
            before = meter.done

            def advance(done: int, before: int = before) -> None:
                meter.done = before + done

            yield Document(self._path.name, name, read_text(self._path, advance, start, end))


def open_file(path: Path, options: SourceOptions) -> Source:
    """One file: records are split by document, plain text is cut by position.

    Raises:
        PHAError: it is of a kind that cannot be read, or too short to be cut.
    """
    kind = kind_of(path)
    if kind.is_records:
        return _split_by_text([path], path.parent, f"file {path.name}", options)
    if kind.is_packed_text:
        raise PHAError(
            f"{path} is one compressed text, which cannot be cut into splits: decompress it, or "
            f"name it train.txt{kind.compression} in a folder with valid.txt{kind.compression}"
        )
    if kind.compression or kind.suffix in {".json", ".arrow", ".zip", ".tar", ".bz2"}:
        raise PHAError(f"{path} is not a kind of text that can be read: those are {KINDS}")
    source = TextFileSource(path)
    options.require_unused(source.description, source.split_rule["rule"])
    return source


def open_folder(folder: Path, options: SourceOptions) -> Source:
    """A folder of split files, of records, or of plain documents.

    Raises:
        PHAError: nothing to read, splits that are missing or there twice, files of several kinds
            that leave open what the corpus is.
    """
    top = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    top = sorted((path for path in top if _can_name_split(path)), key=_order)
    named = [path for path in top if split_word(stem_of(path))]
    if named:
        others = [path for path in top if path not in named and kind_of(path).is_data]
        if others:
            raise PHAError(
                f"{folder} has files named for a split ({_listed(named)}) and others "
                f"({_listed(others)}): keep one sort there, or choose files with a pattern"
            )
        return _split_files(named, folder, f"folder {folder.name}", options)
    data = text_files(folder, lambda path: kind_of(path).is_data)
    if data:
        return _data_folder(folder, data, options)
    files = text_files(folder, lambda path: path.suffix.lower() in DOCUMENT_TEXT)
    if not files:
        kinds = " ".join(sorted(DOCUMENT_TEXT))
        raise PHAError(
            f"{folder} holds no text: no file there is non-empty and one of {kinds}, or {KINDS}"
        )
    source = split_by_path(folder, files, f"folder {folder.name}, {len(files)} files")
    options.require_unused(source.description, source.split_rule["rule"])
    return source


def open_pattern(pattern: str, options: SourceOptions) -> Source:
    """The files that a glob matches: split files where all are named so, else split by document.

    Raises:
        PHAError: no match, or one of a kind that cannot be read; some files named for a split.
    """
    found = (Path(name) for name in glob(pattern, recursive=True))  # noqa: PTH207, it may be absolute
    files = sorted((path for path in found if path.is_file()), key=_order)
    if not files:
        raise PHAError(f"no file matches {pattern!r}: quote the pattern and check the folder")
    for path in files:
        if not (kind_of(path).is_data or kind_of(path).suffix in RUNNING_TEXT | DOCUMENT_TEXT):
            raise PHAError(
                f"{pattern!r} matches {path}, which is not a kind of text that can be read: "
                f"those are {KINDS}"
            )
    root = Path(os.path.commonpath([path.parent for path in files]))
    named = [path for path in files if _can_name_split(path) and split_word(stem_of(path))]
    if len(named) == len(files):
        return _split_files(files, root, f"files {pattern}", options)
    if named:
        others = [path for path in files if path not in named]
        raise PHAError(
            f"{pattern!r} matches files named for a split ({_listed(named)}) and others "
            f"({_listed(others)}): choose one sort"
        )
    return _split_by_text(files, root, f"files {pattern}: {_listed(files)}", options)


def split_by_path(root: Path, files: Iterable[Path], description: str) -> Source:
    """Whole files as documents, split by a hash of their paths below `root`.

    Raises:
        PHAError: a split gets no file.
    """
    by_split: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in files:
        by_split[path_split(path.relative_to(root).as_posix())].append(path)
    for split, paths in by_split.items():
        if not paths:
            raise PHAError(
                f"{root} has too few files: none falls into the {split} split; add files, "
                "or name them train.txt, valid.txt and test.txt"
            )
    return FilesSource(root, by_split, description, _BY_PATH, joins_documents=False)


def text_files(
    root: Path, wanted: Callable[[Path], bool], keep: Callable[[str], bool] = lambda name: True
) -> list[Path]:
    """Non-empty files below `root` that are `wanted`, sorted by relative path.

    Hidden names and those `keep` refuses are left out, and so are links that lead out of `root`.
    """
    inside = root.resolve()
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and keep(name)]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not keep(name) or not wanted(path):
                continue
            if not path.is_file() or path.stat().st_size == 0:
                continue
            if not path.is_symlink() or path.resolve().is_relative_to(inside):
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def files_identity(words: Iterable[str], files: Iterable[Path]) -> str:
    """A hash of `words` and of every file's path, size and date."""
    digest = hashlib.sha256(os.fsencode("\0".join(words)))
    for path in files:
        stat = path.stat()
        digest.update(os.fsencode(f"\0{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}"))
    return digest.hexdigest()


def _order(path: Path) -> tuple[list[str | int], Path]:
    """Numbered parts in order, the one without a number first."""
    return natural_order((path.parent / stem_of(path)).as_posix()), path


def _can_name_split(path: Path) -> bool:
    return kind_of(path).is_data or path.suffix.lower() in RUNNING_TEXT


def _split_files(files: Sequence[Path], root: Path, where: str, options: SourceOptions) -> Source:
    """Files that are all named for a split."""
    named: dict[str, list[Path]] = {}
    for path in files:
        named.setdefault(SPLIT_WORDS[split_word(stem_of(path)) or ""], []).append(path)
    for split, paths in named.items():
        # Several files are one split only as numbered parts; anything else may be the same text.
        if len({(kind_of(path), split_word(stem_of(path))) for path in paths}) > 1:
            raise PHAError(
                f"{where} has more than one variant of the {split} split ({_listed(paths)}): "
                "keep one of them"
            )
        if all(path.stat().st_size == 0 for path in paths):
            raise PHAError(f"the {split} split of {where} is empty: put text into {paths[0].name}")
    are_records = all(kind_of(path).is_records for path in files)
    rule = options.hold_out(HOLDOUT, named) if are_records else None
    for split, example in (("train", "train.txt"), ("validation", "valid.txt")):
        if split not in named and (split == "train" or rule is None):
            raise PHAError(
                f"{where} has files named for a split ({_listed(files)}) but none for {split}: "
                f"name that file like {example}"
            )
    names = _listed([path for split in SPLITS for path in named.get(split, [])])
    description = f"{where}: {names}"
    if rule is None:
        options.require_unused(description, _BY_NAME["rule"])
    return FilesSource(
        root,
        named,
        description,
        rule or _BY_NAME,
        joins_documents=not any(kind_of(path).is_records for path in files),
        text_field=options.text_field,
    )


def _data_folder(folder: Path, data: Sequence[Path], options: SourceOptions) -> Source:
    """Records and compressed texts anywhere below a folder, with the plain texts beside them."""
    for path in data:
        if split_word(stem_of(path)):
            raise PHAError(
                f"{folder} has files named for a split in a subfolder ({path.relative_to(folder)}):"
                " give that subfolder, or hf:FOLDER:CONFIG for the Hub's layout"
            )
    texts = text_files(folder, lambda path: path.suffix.lower() in {".txt", ".text"})
    files = sorted([*data, *texts], key=_order)
    return _split_by_text(files, folder, f"folder {folder.name}: {_listed(files)}", options)


def _split_by_text(
    files: Sequence[Path], root: Path, description: str, options: SourceOptions
) -> Source:
    rule = options.hold_out(HOLDOUT, ())
    assert rule is not None
    return FilesSource(
        root,
        {"train": files},
        description,
        rule,
        joins_documents=False,
        text_field=options.text_field,
    )


def _listed(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths[:_LISTED]]
    more = len(paths) - len(names)
    return ", ".join([*names, f"{more} more"] if more else names)


def _cut_at_line_ends(path: Path) -> list[int]:
    size = _size(path)
    if size == 0:
        raise PHAError(f"{path} is empty")
    cuts = []
    try:
        with path.open("rb") as file:
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
    return bounds


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise PHAError(f"{path} cannot be read ({error.strerror})") from error


def _refuse(error: OSError) -> None:
    raise PHAError(f"{error.filename} cannot be read ({error.strerror})") from error
