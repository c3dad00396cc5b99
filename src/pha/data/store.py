"""The token store: a corpus as token ids in memory-mapped files, with what made them.

    STORE/store.json             what it is made of, counts and hashes
    STORE/tokenizer/             the tokenizer, as `save_pretrained` writes it
    STORE/SPLIT.bin              token ids, uint16 (uint32 for vocabularies above 65,536 entries)
    STORE/SPLIT.documents.npy    position of each document's first token, int64

A store may consist of parts, which are in folders below it and are stores themselves; see
`pha.data.parts`. Numbers are little-endian. A store is written whole or not at all, and checked
when opened.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from pha.data.parts import SPLIT_LINES, Part, Shards
from pha.data.splits import SPLITS
from pha.data.tokenizer import load_tokenizer, saved_tokenizer_sha256, tokenizer_hashes
from pha.utils.errors import PHAError
from pha.utils.files import sha256_file
from pha.utils.formats import read_json
from pha.utils.versions import check_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
RECORD = "store.json"
TOKENIZER = "tokenizer"
STORE_FILES = {
    *(RECORD, TOKENIZER, SPLIT_LINES),
    *(f"{split}{ending}" for split in SPLITS for ending in (".bin", ".documents.npy")),
}
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_FACTS = ("source", "description", "tokenizer", "tokenizer_sha256", "vocab_size", "separator")
_CHECK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Counts:
    """Sizes of a split; all but `tokens` are of its text, without separators.

    Attributes:
        tokens: ids, separators included.
        documents: documents that have text.
        words: `len(text.split())`.
        lines: line feeds.
        bytes: UTF-8 bytes.
    """

    tokens: int = 0
    documents: int = 0
    words: int = 0
    lines: int = 0
    bytes: int = 0


class TokenStore:
    """A store on disk, opened for reading by `TokenStore.open`.

    Attributes:
        path: the folder.
        parts: that it was joined of, or 0.
        splits: the splits it has, in the order of `SPLITS`.
        vocab_size: every id is below it.
        tokenizer_sha256: of the tokenizer that made the ids.
        sha256: one hash of the tokenizer and of every split's ids and document starts.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self._record = record
        self._entries: dict[str, dict[str, Any]] = record["splits"]
        self._dtype = DTYPES[record["dtype"]]
        if not isinstance(record.get("split", {}), dict):
            raise TypeError("split")
        self.parts = int(record.get("parts", 0))
        self.splits = tuple(split for split in SPLITS if split in self._entries)
        self.vocab_size = int(record["vocab_size"])
        self.tokenizer_sha256 = str(record["tokenizer_sha256"])
        self._counts = {
            split: Counts(**{field.name: int(entry[field.name]) for field in fields(Counts)})
            for split, entry in self._entries.items()
        }
        self._shards = {split: self._shards_of(split) for split in self.splits}
        self._facts = {key: record[key] for key in _FACTS}
        self.sha256 = _combined_sha256(self.tokenizer_sha256, self._entries)

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> TokenStore:
        """Open a store and check it; with `verify` also its tokens, which reads all of them once.

        Raises:
            PHAError: not a store, one of another format, or files that are missing, truncated,
                altered or made by another tokenizer.
        """
        path = Path(path)
        if not (path / RECORD).is_file():
            in_parts = any(path.glob("part-*-of-*"))
            why = "its parts are not joined: run `pha join`" if in_parts else f"it has no {RECORD}"
            raise PHAError(f"{path} is not a token store: {why}")
        record = read_json(path / RECORD)
        version = record.get("format") if isinstance(record, dict) else None
        if version is None:
            raise PHAError(f"{path} is not a token store: its {RECORD} names no format")
        check_format(path, version, FORMAT, oldest=1)
        try:
            store = cls(path, record)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise unusable(path / RECORD, "is damaged") from error
        if saved_tokenizer_sha256(path / TOKENIZER) != store.tokenizer_sha256:
            raise unusable(path / TOKENIZER, "is not the tokenizer that made the ids of this store")
        for split in store.splits:
            for shard in store._shards[split]:
                store._check(split, shard, verify)
            if verify:
                store._check_ids(split)
        return store

    def tokens(self, split: str) -> np.ndarray:
        """The ids of a split: (tokens,) uint16 or uint32, memory-mapped and read-only.

        Of a store in parts they are `Shards`, which are sliced and indexed as an array is.
        """
        self._require(split)
        files = [shard.folder / f"{split}.bin" for shard in self._shards[split] if shard.tokens]
        maps = [np.memmap(file, dtype=self._dtype, mode="r") for file in files]
        if not maps:
            return np.empty(0, self._dtype)
        return maps[0] if len(maps) == 1 else cast(np.ndarray, Shards(maps))

    def document_starts(self, split: str) -> np.ndarray:
        """Position of the first token of each document: (documents,) int64, ascending from 0."""
        self._require(split)
        shards = self._shards[split]
        starts = [_read_starts(shard.folder / f"{split}.documents.npy") for shard in shards]
        firsts = np.cumsum([0, *(shard.tokens for shard in shards)])
        return np.concatenate([s + first for s, first in zip(starts, firsts, strict=False)])

    def counts(self, split: str) -> Counts:
        """Tokens, documents, words, lines and bytes of a split."""
        self._require(split)
        return self._counts[split]

    def frequencies(self, split: str) -> np.ndarray:
        """How often each id occurs in a split: (vocab_size,) int64."""
        tokens = self.tokens(split)
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, len(tokens), _CHECK_TOKENS):
            part = tokens[start : start + _CHECK_TOKENS]
            counts += np.bincount(part, minlength=self.vocab_size)
        return counts

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer that made the ids."""
        return load_tokenizer(str(self.path / TOKENIZER))

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Check that a model's tokenizer is the one that made the ids.

        Raises:
            PHAError: it is another one.
        """
        hashes = tokenizer_hashes(tokenizer)
        if self.tokenizer_sha256 not in hashes:
            raise PHAError(
                f"{self.path} was made with the tokenizer {self._record['tokenizer']} "
                f"({self.tokenizer_sha256[:12]}), but the model has another ({hashes[0][:12]}): "
                "prepare a store with the model's tokenizer"
            )

    def describe(self) -> dict[str, Any]:
        """What a result that rests on this store has to say of it, ready for JSON."""
        return {
            "sha256": self.sha256,
            **self._facts,
            "tokenizer_training_bytes": self._record.get("tokenizer_training_bytes"),
            "split": self._record.get("split"),
            "counts": {split: asdict(self._counts[split]) for split in self.splits},
        }

    def _require(self, split: str) -> None:
        if split not in self.splits:
            raise PHAError(f"{self.path} has no {split} split: it has {', '.join(self.splits)}")

    def _shards_of(self, split: str) -> list[_Shard]:
        """The files of a split, in order: its own, or those of each part."""
        if not self.parts:
            return [_Shard.of(self.path, self._entries[split])]
        numbered = zip(range(1, self.parts + 1), self._entries[split]["shards"], strict=True)
        return [_Shard.of(self.path / Part(n, self.parts).folder, each) for n, each in numbered]

    def _check(self, split: str, shard: _Shard, verify: bool) -> None:
        path = shard.folder / f"{split}.documents.npy"
        starts = _read_starts(path)
        if (
            starts.dtype != np.dtype("<i8")
            or starts.shape != (shard.documents,)
            or hashlib.sha256(starts.tobytes()).hexdigest() != shard.document_starts_sha256
        ):
            raise unusable(path, "is not what was written for this store")
        path = shard.folder / f"{split}.bin"
        if not path.is_file():
            raise unusable(path, "is missing")
        size, expected = path.stat().st_size, shard.tokens * self._dtype.itemsize
        if size != expected:
            raise unusable(path, f"is truncated or altered, with {size} bytes, not {expected}")
        if verify and sha256_file(path) != shard.sha256:
            raise unusable(path, "is altered, as its SHA-256 is not the recorded one")

    def _check_ids(self, split: str) -> None:
        tokens = self.tokens(split)
        parts = range(0, len(tokens), _CHECK_TOKENS)
        largest = max((int(tokens[n : n + _CHECK_TOKENS].max()) for n in parts), default=0)
        if largest >= self.vocab_size:
            path = self.path / f"{split}.bin"
            raise unusable(path, f"has id {largest} in a vocabulary of {self.vocab_size}")


class _Shard(NamedTuple):
    """The files of a split in one folder, and what they have to be."""

    folder: Path
    tokens: int
    documents: int
    sha256: str
    document_starts_sha256: str

    @classmethod
    def of(cls, folder: Path, entry: dict[str, Any]) -> _Shard:
        counts = int(entry["tokens"]), int(entry["documents"])
        return cls(folder, *counts, str(entry["sha256"]), str(entry["document_starts_sha256"]))


def _read_starts(path: Path) -> np.ndarray:
    try:
        # Mapped first, as that takes no memory for what the file promises and does not hold.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # numpy parses the header as Python, with all of its errors
        raise unusable(path, "is missing or damaged") from error


def unusable(path: Path, what: str) -> PHAError:
    """The refusal of a file of a store."""
    return PHAError(f"{path} {what}: prepare it again")


class SplitWriter:
    """Writes the files of one split; memory holds 8 bytes for each document, its start.

    `separator` is the id written after every document, and `file`, the open file of ids, is for the
    caller to close.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype[Any], separator: int | None
    ) -> None:
        self.file = (folder / f"{split}.bin").open("wb")
        self._starts_file = folder / f"{split}.documents.npy"
        self._dtype = dtype
        self._ending = np.array([] if separator is None else [separator])
        self._digest = hashlib.sha256()
        self._starts = array("q")
        self._tokens = self._words = self._lines = self._bytes = 0

    def begin_document(self) -> None:
        """Let what is added from here on be a new document."""
        if self._starts:
            self._write(self._ending)
        self._starts.append(self._tokens)

    def add(self, ids: np.ndarray, words: int, lines: int, size: int) -> None:
        """Write the ids of the document's next piece, a text of so many words, lines and bytes."""
        self._write(ids)
        self._words += words
        self._lines += lines
        self._bytes += size

    def finish(self) -> dict[str, Any]:
        """Write what remains and return the split's entry in store.json: counts and hashes."""
        if self._starts:
            self._write(self._ending)
        self.file.close()
        starts = np.array(self._starts, dtype="<i8")
        np.save(self._starts_file, starts, allow_pickle=False)
        counts = Counts(self._tokens, len(starts), self._words, self._lines, self._bytes)
        return {
            **asdict(counts),
            "sha256": self._digest.hexdigest(),
            "document_starts_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
        }

    def _write(self, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self.file.write(data)
        self._digest.update(data)
        self._tokens += len(ids)


def is_store(folder: Path) -> bool:
    """Whether a folder holds a token store, of any format."""
    try:
        record = read_json(folder / RECORD)
    except PHAError:
        return False
    return isinstance(record, dict) and {"format", "tokenizer_sha256"} <= record.keys()


def _combined_sha256(tokenizer: str, entries: dict[str, dict[str, Any]]) -> str:
    hashes = {
        split: [entry["sha256"], entry["document_starts_sha256"]]
        for split, entry in entries.items()
    }
    text = json.dumps({"tokenizer": tokenizer, "splits": hashes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
