"""Corpora in files: one text, a folder, or a pattern; plain, compressed or in records.

What cannot be read, or leaves open which file belongs to which split, raises a PHAError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any

from pha.data.documents import Source, SourceOptions, Unit, identity_of, joined
from pha.data.readers import (
    DOCUMENT_TEXT,
    KINDS,
    RUNNING_TEXT,
    Meter,
    kind_of,
    line_end,
    read_records,
    read_text,
)
from pha.data.remote import TextFile, find_remote, shown_url, size_of
from pha.data.splits import SPLIT_WORDS, SPLITS, natural_order, path_split, split_word
from pha.utils.errors import PHAError

HOLDOUT = Fraction(5, 100)

_LISTED = 8  # file names in a description
_SHARES = {"train": "9/10", "validation": "1/20", "test": "1/20"}
_BY_NAME = {"rule": "files named for their split"}
_BY_PATH = {"rule": "hash of the path", "fractions": _SHARES}
_BY_POSITION = {"rule": "position in the file, at line ends", "fractions": _SHARES}


def open_file(path: TextFile, options: SourceOptions) -> Source:
    """One file: records are split by document, plain text is cut by position."""
    kind = kind_of(path)
    if kind.is_records:
        return _split_by_text([path], f"file {path.name}", options)
    if kind.is_packed_text:
        raise PHAError(
            f"{path} is one compressed text, which cannot be cut into splits: decompress it, or "
            f"name it train.txt{kind.compression} in a folder with valid.txt{kind.compression}"
        )
    if kind.compression or kind.suffix in {".json", ".arrow", ".zip", ".tar", ".bz2"}:
        raise PHAError(f"{path} is not a kind of text that can be read: those are {KINDS}")
    return _cut_text(path, options)


def open_folder(folder: Path, options: SourceOptions) -> Source:
    """A folder of split files, of records, or of plain documents."""
    where = f"folder {folder.name}"
    top = [path for path in folder.iterdir() if path.name[0] != "."]
    top = [path for path in top if _split_word(path) or kind_of(path).is_data]
    top = [path for path in top if require_target(path).is_file()]
    if any(map(_split_word, top)):
        return _split_files(sorted(top, key=_order), where, options)
    files = text_files(folder, lambda path: kind_of(path).is_data or kind_of(path).is_document)
    if any(kind_of(path).is_data for path in files):
        # Beside data .md, .rst and .py are about it, not of it.
        files = [p for p in files if kind_of(p).is_data or kind_of(p).suffix in {".txt", ".text"}]
        for path in files:
            if kind_of(path).is_data and _split_word(path):
                raise PHAError(
                    f"{folder} has files named for a split in a subfolder "
                    f"({path.relative_to(folder)}): give that subfolder, or hf:FOLDER:CONFIG for "
                    "the Hub's layout"
                )
        files.sort(key=_order)
        return _split_by_text(files, f"{where}: {_listed(files)}", options)
    if not files:
        kinds = " ".join(sorted(DOCUMENT_TEXT))
        raise PHAError(
            f"{folder} holds no text: no file there is non-empty and one of {kinds}, or {KINDS}"
        )
    where = f"{where}, {len(files)} files"
    if {path_split(path.relative_to(folder).as_posix()) for path in files} != set(SPLITS):
        # Too few for whole ones to fall into every split.
        cut = [_cut_text(path, options) for path in files]
        return joined(cut, f"{where}, each cut 90/5/5 at line ends")
    return split_by_path(folder, files, where, options)


def open_pattern(pattern: str, options: SourceOptions) -> Source:
    """The files that a glob matches: split files where all are named so, else split by document."""
    found = (Path(name) for name in glob(pattern, recursive=True))  # noqa: PTH207, it may be absolute
    files = [path for path in found if path.is_file()]
    if not files:
        raise PHAError(f"no file matches {pattern!r}: quote the pattern and check the folder")
    return _open_found(pattern, files, options)


def open_remote(spec: str, options: SourceOptions) -> Source:
    """The file behind a URL, or those that match a URL with `*`, as local ones are opened."""
    files = find_remote(spec)
    if not files:
        raise PHAError(
            f"there is no file {shown_url(spec)}, or no answer: give the URL of a file, or one "
            "with * for several, in quotes"
        )
    return _open_found(spec, files, options) if "*" in spec else open_file(files[0], options)


def _open_found(pattern: str, found: Iterable[TextFile], options: SourceOptions) -> Source:
    files, pattern = sorted(found, key=_order), shown_url(pattern)
    for path in files:
        if not (kind_of(path).is_data or kind_of(path).suffix in RUNNING_TEXT | DOCUMENT_TEXT):
            raise PHAError(
                f"{pattern!r} matches {path}, which is not a kind of text that can be read: "
                f"those are {KINDS}"
            )
    if any(map(_split_word, files)):
        return _split_files(files, f"files {pattern}", options)
    return _split_by_text(files, f"files {pattern}: {_listed(files)}", options)


def split_by_path(
    root: Path, files: Iterable[Path], description: str, options: SourceOptions
) -> Source:
    """Whole files as documents, split by a hash of their paths below `root`."""
    by_split: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in files:
        by_split[path_split(path.relative_to(root).as_posix())].append(path)
    for split, paths in by_split.items():
        if not paths:
            raise PHAError(
                f"{root} has too few files: none falls into the {split} split; add files, "
                "or name them train.txt, valid.txt and test.txt"
            )
    return _source(by_split, description, options, _BY_PATH)


def text_files(
    root: Path, wanted: Callable[[Path], bool], keep: Callable[[str], bool] = lambda name: True
) -> list[Path]:
    """Non-empty files below `root` that are `wanted`, sorted by relative path.

    Hidden names and those `keep` refuses are left out. Links are followed, each folder once; a file
    that several names lead to is read once, by its own name if that is among them.

    Raises:
        PHAError: a folder that cannot be read, or a link that leads to nothing.
    """

    def refuse(error: OSError) -> None:
        raise PHAError(f"{error.filename} cannot be read ({error.strerror})") from error

    def is_kept(name: str) -> bool:
        return not name.startswith(".") and keep(name)

    inside = root.resolve()
    followed: set[Path] = set()

    def is_new(folder: Path) -> bool:
        """Whether a folder is no link, or a link to what no other led to: links may be circles."""
        if not folder.is_symlink():
            return True
        real = folder.resolve()
        is_first = real not in followed
        followed.add(real)
        return is_first

    found: dict[Path, Path] = {}
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        kept = (Path(folder, name) for name in sorted(filter(is_kept, subfolders)))
        subfolders[:] = [path.name for path in kept if is_new(path)]
        for path in filter(wanted, (Path(folder, name) for name in filter(is_kept, names))):
            if require_target(path).is_file() and path.stat().st_size > 0:
                real = path.resolve()
                if real not in found or real == inside / path.relative_to(root):
                    found[real] = path
    return sorted(found.values(), key=lambda path: path.relative_to(root).as_posix())


def require_target(path: Path) -> Path:
    """`path`, if it is no link to nothing, such as that of a file that was not fetched."""
    if path.is_symlink() and not path.exists():
        raise PHAError(f"{path} is a link that leads to nothing: get its file, or remove it")
    return path


def _source(
    files: Mapping[str, Sequence[TextFile]],
    description: str,
    options: SourceOptions,
    otherwise: dict[str, Any],
    holdout: Fraction | None = None,
) -> Source:
    """Files of text or records, each in a split."""
    given = tuple(split for split in SPLITS if files.get(split))
    held_out, rule = options.split_rule(description, given, otherwise, holdout)
    words = [description, options.text_field, str(rule)]
    paths = [path for split in given for path in files[split]]

    def read(path: TextFile, meter: Meter) -> Iterator[Iterable[str]]:
        if kind_of(path).is_records:
            for text in read_records(path, options.text_field, meter):
                yield (text,)
        else:
            yield read_text(path, meter)

    return Source(
        description=description,
        identity=identity_of(words, paths),
        joins_documents=rule is _BY_NAME and not any(kind_of(path).is_records for path in paths),
        given=given,
        held_out=held_out,
        split_rule=rule,
        units=tuple(
            Unit(split, path.name, size_of(path), partial(read, path))
            for split in given
            for path in files[split]
        ),
    )


def _split_files(files: Sequence[TextFile], where: str, options: SourceOptions) -> Source:
    """Files that are all named for a split."""
    named = [path for path in files if _split_word(path)]
    others = [path for path in files if path not in named]
    if others:
        raise PHAError(
            f"{where} has files named for a split ({_listed(named)}) and others "
            f"({_listed(others)}): keep one sort there, or choose files with a pattern"
        )
    by_split: dict[str, list[TextFile]] = {}
    for path in files:
        by_split.setdefault(SPLIT_WORDS[_split_word(path) or ""], []).append(path)
    for split, paths in by_split.items():
        # Several files are one split only as numbered parts; anything else may be the same text.
        if len({(*kind_of(path)[1:], _split_word(path)) for path in paths}) > 1:
            raise PHAError(
                f"{where} has more than one variant of the {split} split ({_listed(paths)}): "
                "keep one of them"
            )
        if all(size_of(path) == 0 for path in paths):
            raise PHAError(f"the {split} split of {where} is empty: put text into {paths[0].name}")
    are_records = all(kind_of(path).is_records for path in files)
    for split, example in (("train", "train.txt"), ("validation", "valid.txt")):
        if split not in by_split and not (split == "validation" and are_records):
            raise PHAError(
                f"{where} has files named for a split ({_listed(files)}) but none for {split}: "
                f"name that file like {example}"
            )
    description = f"{where}: {_listed([p for split in SPLITS for p in by_split.get(split, [])])}"
    return _source(by_split, description, options, _BY_NAME, HOLDOUT)


def _split_by_text(files: Sequence[TextFile], description: str, options: SourceOptions) -> Source:
    return _source({"train": files}, description, options, {}, HOLDOUT)


def _cut_text(path: TextFile, options: SourceOptions) -> Source:
    """One text cut into 90%, 5% and 5% of its bytes, each to the end of the line it ends in."""
    size = size_of(path)
    if size is None:
        raise PHAError(f"{path} comes from a server that does not tell its size: download it first")
    if size == 0:
        raise PHAError(f"{path} is empty")
    cuts = [line_end(path, max(0, size * percent // 100 - 1)) for percent in (90, 95)]
    bounds = [0, *cuts, size]
    if sorted(set(bounds)) != bounds:
        raise PHAError(
            f"{path} has too few lines to be cut 90/5/5 at line ends: use a longer file, "
            "or a folder with train.txt, valid.txt and test.txt"
        )
    description = f"text file {path.name}, cut 90/5/5 at line ends"
    held_out, rule = options.split_rule(description, SPLITS, _BY_POSITION)

    def read(first: int, last: int, meter: Meter) -> Iterator[Iterable[str]]:
        yield read_text(path, meter, first, last)

    return Source(
        description=description,
        identity=identity_of([description], [path]),
        joins_documents=True,
        given=SPLITS,
        held_out=held_out,
        split_rule=rule,
        units=tuple(
            Unit(split, path.name, last - first, partial(read, first, last))
            for split, (first, last) in zip(SPLITS, pairwise(bounds), strict=True)
        ),
    )


def _split_word(path: TextFile) -> str | None:
    """The word for a split in the name of a file that may be one: not code, not notes."""
    kind = kind_of(path)
    return split_word(kind.stem) if kind.is_records or kind.suffix in RUNNING_TEXT else None


def _order(path: TextFile) -> tuple[list[str | int], str]:
    """Numbered parts in order, the one without a number first."""
    return natural_order((path.parent / kind_of(path).stem).as_posix()), str(path)


def _listed(paths: Sequence[TextFile]) -> str:
    names = [path.name for path in paths[:_LISTED]]
    more = len(paths) - len(names)
    return ", ".join([*names, f"{more} more"] if more else names)
