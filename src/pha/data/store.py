"""The token store: a corpus as token ids in memory-mapped files, with what made them.

    STORE/store.json             what it is made of, counts and hashes
    STORE/tokenizer/             the tokenizer, as `save_pretrained` writes it
    STORE/SPLIT.bin              token ids, uint16 (uint32 for vocabularies above 65,536 entries)
    STORE/SPLIT.documents.npy    position of each document's first token, int64

Numbers are little-endian. A store is written whole or not at all, and checked when opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from pha.data.encoding import TextEncoder
from pha.data.sources import SPLITS, Source, open_source
from pha.data.tokenizer import (
    load_tokenizer,
    saved_tokenizer_sha256,
    tokenizer_identity,
    tokenizer_sha256,
    vocabulary_size,
)
from pha.data.writer import Counts, Progress, SplitWriter, bin_name, starts_name
from pha.utils.errors import PHAError
from pha.utils.files import atomic_folder, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["FORMAT", "Counts", "Progress", "Separator", "TokenStore", "cached_store", "prepare"]

FORMAT = 1
Separator = Literal["auto", "end-of-text", "none"]

_RECORD = "store.json"
_TOKENIZER = "tokenizer"
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_CHECK_TOKENS = 1 << 22


class TokenStore:
    """A store on disk, opened for reading by `TokenStore.open`.

    Attributes:
        path: the folder.
        splits: the splits it has, in the order of `SPLITS`.
        vocab_size: every id is below it.
        tokenizer_sha256: of the tokenizer that made the ids.
        sha256: one hash of the tokenizer and of every split's ids and document starts.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self._record = record
        self._entries: dict[str, dict[str, Any]] = record["splits"]
        self._dtype = _DTYPES[record["dtype"]]
        self.splits = tuple(split for split in SPLITS if split in self._entries)
        self.vocab_size = int(record["vocab_size"])
        self.tokenizer_sha256 = str(record["tokenizer_sha256"])
        self._counts = {
            split: Counts(**{field.name: int(entry[field.name]) for field in fields(Counts)})
            for split, entry in self._entries.items()
        }
        self.sha256 = _combined_sha256(self.tokenizer_sha256, self._entries)

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> TokenStore:
        """Open a store and check it.

        Args:
            path: the store's folder.
            verify: also read all tokens, to compare their hashes and the range of the ids.

        Raises:
            PHAError: not a store, one of another format, or files that are missing, truncated,
                altered or made by another tokenizer.
        """
        path = Path(path)
        if not (path / _RECORD).is_file():
            raise PHAError(f"{path} is not a token store: it has no {_RECORD}")
        record = read_json(path / _RECORD)
        version = record.get("format") if isinstance(record, dict) else None
        if version is None:
            raise PHAError(f"{path} is not a token store: its {_RECORD} names no format")
        if version != FORMAT:
            raise PHAError(
                f"{path} has store format {version}, but this version of pha reads {FORMAT}: "
                "prepare the store again, or use the version that wrote it"
            )
        try:
            store = cls(path, record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PHAError(f"{path / _RECORD} is damaged: prepare the store again") from error
        if saved_tokenizer_sha256(path / _TOKENIZER) != store.tokenizer_sha256:
            raise PHAError(
                f"{path / _TOKENIZER} is not the tokenizer that made the ids of this store: "
                "prepare the store again"
            )
        for split in store.splits:
            store._check_starts(split)
            store._check_ids(split, verify)
        return store

    def tokens(self, split: str) -> np.ndarray:
        """The ids of a split: (tokens,) uint16 or uint32, memory-mapped and read-only."""
        self._require(split)
        return np.memmap(self.path / bin_name(split), dtype=self._dtype, mode="r")

    def document_starts(self, split: str) -> np.ndarray:
        """Position of the first token of each document: (documents,) int64, ascending from 0."""
        self._require(split)
        path = self.path / starts_name(split)
        try:
            starts: np.ndarray = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise PHAError(f"{path} is missing or damaged: prepare the store again") from error
        return starts

    def counts(self, split: str) -> Counts:
        """Tokens, documents, words, lines and bytes of a split."""
        self._require(split)
        return self._counts[split]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer that made the ids."""
        return load_tokenizer(str(self.path / _TOKENIZER))

    def require_tokenizer(self, sha256: str) -> None:
        """Check that a model's tokenizer, given by its hash, is the one that made the ids.

        Raises:
            PHAError: it is another one.
        """
        if sha256 != self.tokenizer_sha256:
            raise PHAError(
                f"{self.path} was made with the tokenizer {self._record['tokenizer']} "
                f"({self.tokenizer_sha256[:12]}), but the model has another ({sha256[:12]}): "
                "prepare a store with the model's tokenizer"
            )

    def describe(self) -> dict[str, Any]:
        """What a result that rests on this store has to say of it, ready for JSON."""
        keys = ("source", "description", "tokenizer", "tokenizer_sha256", "vocab_size", "separator")
        return {
            "sha256": self.sha256,
            **{key: self._record[key] for key in keys},
            "counts": {split: asdict(self._counts[split]) for split in self.splits},
        }

    def _require(self, split: str) -> None:
        if split not in self.splits:
            raise PHAError(f"{self.path} has no {split} split: it has {', '.join(self.splits)}")

    def _check_starts(self, split: str) -> None:
        starts = self.document_starts(split)
        counts = self._counts[split]
        entry = self._entries[split]
        if (
            starts.dtype != np.dtype("<i8")
            or starts.shape != (counts.documents,)
            or hashlib.sha256(starts.tobytes()).hexdigest() != entry.get("document_starts_sha256")
        ):
            raise PHAError(
                f"{self.path / starts_name(split)} is not what was written for this store: "
                "prepare the store again"
            )

    def _check_ids(self, split: str, verify: bool) -> None:
        path = self.path / bin_name(split)
        if not path.is_file():
            raise PHAError(f"{path} is missing: prepare the store again")
        expected = self._counts[split].tokens * self._dtype.itemsize
        if path.stat().st_size != expected:
            raise PHAError(
                f"{path} is truncated or altered, with {path.stat().st_size} bytes instead of "
                f"{expected}: prepare the store again"
            )
        if not verify:
            return
        if sha256_file(path) != self._entries[split].get("sha256"):
            raise PHAError(
                f"{path} is altered, as its SHA-256 is not the recorded one: "
                "prepare the store again"
            )
        tokens = self.tokens(split)
        parts = range(0, len(tokens), _CHECK_TOKENS)
        largest = max(int(tokens[start : start + _CHECK_TOKENS].max()) for start in parts)
        if largest >= self.vocab_size:
            raise PHAError(
                f"{path} has id {largest}, but {_RECORD} says there are {self.vocab_size}: "
                "prepare the store again"
            )


def prepare(
    source_spec: str,
    tokenizer_spec: str,
    out: Path,
    *,
    separator: Separator = "auto",
    progress: Progress | None = None,
) -> TokenStore:
    """Encode a corpus into a token store.

    Text is streamed: memory holds one document, not the corpus.

    Args:
        source_spec: see `open_source`.
        tokenizer_spec: see `load_tokenizer`; `bpe:SIZE` is trained on the train split.
        out: the store's folder; an existing store there is replaced when the new one is whole.
        separator: `end-of-text` ends every document with that token, `none` puts nothing between
            them, `auto` picks `none` where a split is one running text (a single file, files named
            for their split) and `end-of-text` elsewhere.
        progress: told how far the work is.

    Raises:
        PHAError: see `open_source` and `load_tokenizer`; `out` exists and is no store or cannot
            be written; a split without text.
    """
    return _prepare(open_source(source_spec), source_spec, tokenizer_spec, out, separator, progress)


def cached_store(
    source_spec: str, tokenizer_spec: str, root: Path, progress: Progress | None = None
) -> TokenStore:
    """Open the store of a corpus and tokenizer below `root`, after preparing it if need be.

    Its folder is named for both and for a hash that changes with the corpus's files (their names,
    sizes and dates), the tokenizer's files and the Python version that `stdlib` comes from. A
    damaged store is prepared again.

    Raises:
        PHAError: see `prepare`.
    """
    source = open_source(source_spec)
    key = json.dumps([FORMAT, source.identity, tokenizer_identity(tokenizer_spec)])
    names = f"{Path(source_spec).name} {Path(tokenizer_spec).name}"
    slug = "-".join(re.findall(r"[a-z0-9]+", names.lower()))[:48]
    path = Path(root) / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (path / _RECORD).is_file():
        try:
            return TokenStore.open(path)
        except PHAError:
            pass  # prepared anew below
    return _prepare(source, source_spec, tokenizer_spec, path, "auto", progress)


def _prepare(
    source: Source,
    source_spec: str,
    tokenizer_spec: str,
    out: Path,
    separator: Separator,
    progress: Progress | None,
) -> TokenStore:
    out = Path(out)
    _require_replaceable(out)
    if separator not in get_args(Separator):
        raise PHAError(f"no separator {separator!r}: give one of {', '.join(get_args(Separator))}")
    if separator == "auto":
        separator = "none" if source.joins_documents else "end-of-text"
    report = progress or (lambda stage, done, total: None)
    tokenizer = load_tokenizer(tokenizer_spec, _training_texts(source, report))
    if separator == "end-of-text" and tokenizer.eos_token_id is None:
        raise PHAError(
            f"the tokenizer {tokenizer_spec} has no end-of-text token: use separator none"
        )
    vocab_size = vocabulary_size(tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    try:
        with atomic_folder(out) as folder:
            writer = SplitWriter(
                folder,
                TextEncoder(tokenizer),
                _DTYPES[dtype],
                tokenizer.eos_token_id if separator == "end-of-text" else None,
            )
            entries = {
                split: _write_split(writer, source, split, report) for split in source.splits
            }
            tokenizer.save_pretrained(str(folder / _TOKENIZER))
            record = {
                "format": FORMAT,
                "source": source_spec,
                "description": source.description,
                "tokenizer": tokenizer_spec,
                "tokenizer_sha256": tokenizer_sha256(tokenizer),
                "vocab_size": vocab_size,
                "dtype": dtype,
                "separator": separator,
                "splits": entries,
            }
            write_json(folder / _RECORD, record)
    except OSError as error:
        raise PHAError(
            f"the token store {out} cannot be written ({error.strerror or error})"
        ) from error
    return TokenStore.open(out, verify=False)


def _require_replaceable(out: Path) -> None:
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not (is_free or _is_store(out)):
        raise PHAError(f"{out} exists and is not a token store: remove it or name another folder")


def _is_store(folder: Path) -> bool:
    try:
        record = read_json(folder / _RECORD)
    except PHAError:
        return False
    return isinstance(record, dict) and {"format", "tokenizer_sha256"} <= record.keys()


def _training_texts(source: Source, report: Progress) -> Iterator[str]:
    done, total = 0, source.size("train")
    for document in source.documents("train"):
        yield document.text
        done += len(document.text.encode())
        report("tokenizer", done, total)


def _write_split(
    writer: SplitWriter, source: Source, split: str, report: Progress
) -> dict[str, Any]:
    total = source.size(split)
    entry = writer.write(split, source.documents(split), lambda done: report(split, done, total))
    if entry["documents"] == 0:
        raise PHAError(f"the {split} split of {source.description} has no text: add some")
    return entry


def _combined_sha256(tokenizer: str, entries: dict[str, dict[str, Any]]) -> str:
    hashes = {
        split: [entry["sha256"], entry["document_starts_sha256"]]
        for split, entry in entries.items()
    }
    text = json.dumps({"tokenizer": tokenizer, "splits": hashes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
