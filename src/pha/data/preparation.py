"""Making a token store: one pass over a corpus, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pha.data.documents import Document, Source, SourceOptions
from pha.data.encoding import TextEncoder, cut
from pha.data.hub import HubUnreachableError
from pha.data.parts import SPLIT_LINES, Part
from pha.data.readers import Meter
from pha.data.remote import shown_url
from pha.data.sources import open_source, open_sources
from pha.data.store import (
    DTYPES,
    FORMAT,
    RECORD,
    STORE_FILES,
    TOKENIZER,
    SplitWriter,
    TokenStore,
    is_store,
)
from pha.data.tokenizer import (
    load_tokenizer,
    tokenizer_identity,
    tokenizer_sha256,
    vocabulary_size,
)
from pha.utils.errors import PHAError
from pha.utils.files import atomic_folder, write_json
from pha.utils.outputs import claimed, require_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Separator = Literal["auto", "end-of-text", "none"]

TRAINING_BYTES = 1_000_000_000  # of text that a tokenizer is trained on, or a little more
_BATCH_BYTES = 1 << 20  # of text that the tokenizer's threads encode side by side


@dataclass(frozen=True)
class PreparationState:
    """How far a preparation is; each stage begins with one in which nothing is done.

    Attributes:
        stage: `tokenizer` (reading text to train one) or `encoding`.
        fraction: of the stage, between 0 and 1; None where the amount of text is not known.
        documents: begun in this stage.
        bytes: of text, done.
        tokens: done; none for the tokenizer.
    """

    stage: str
    fraction: float | None
    documents: int
    bytes: int
    tokens: int


Progress = Callable[[PreparationState], None]


def prepare(
    source_spec: str | Sequence[str],
    tokenizer_spec: str,
    out: Path,
    *,
    separator: Separator = "auto",
    options: SourceOptions | None = None,
    part: Part | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Encode a corpus into a token store.

    Text is streamed: memory holds a few megabytes of it and the document (or the rows) being
    read. The tokenizer's threads encode while the next text is read.

    Args:
        source_spec: see `open_source`; several are joined into one corpus.
        tokenizer_spec: see `load_tokenizer`; `bpe:SIZE` is trained on the first
            `TRAINING_BYTES` of the train split, in a pass of its own.
        out: the store's folder; an existing store there is replaced when the new one is whole.
        separator: `end-of-text` ends every document with that token, `none` puts nothing between
            them, `auto` picks `none` where a split is one running text, else `end-of-text`.
        options: text field and split of the source, where it leaves them open.
        part: encode this part of the source's files alone, into a folder of `out`, for
            `pha.data.joining.join`. A tokenizer is trained on the text that it is always trained
            on.
        progress: told how far the work is.

    Raises:
        PHAError: see `open_source` and `load_tokenizer`; `out` exists and is no store or cannot
            be written; a split without text; more parts than files.
    """
    if part is not None:
        if is_store(out) and not TokenStore.open(out, verify=False).parts:
            raise PHAError(f"{out} is a store that one process made: name another for the parts")
        out = out / part.folder
    _require_replaceable(out)
    specs = [source_spec] if isinstance(source_spec, str) else source_spec
    source, name = open_sources(specs, options), " ".join(map(shown_url, specs))
    with claimed(out):
        return _make_store(source, name, tokenizer_spec, out, separator, progress, part)


def cached_store(
    source_spec: str, tokenizer_spec: str, root: Path, progress: Progress | None = None
) -> TokenStore:
    """Open the store of a corpus and tokenizer below `root`, after preparing it if need be.

    Its folder is named for both and for a hash that changes with the corpus's files (their names,
    sizes and dates), a Hub data set's revision, the split, the tokenizer's files and the Python
    version that `stdlib` comes from. A damaged store is prepared again. Where the Hub does not
    answer, the latest store made of the same data set is taken.

    Raises:
        PHAError: see `prepare`.
    """
    names = f"{Path(shown_url(source_spec)).name} {Path(tokenizer_spec).name}"
    slug = "-".join(re.findall(r"[a-z0-9]+", names.lower()))[:48]
    try:
        source = open_source(source_spec)
    except HubUnreachableError:
        earlier = _latest_store(Path(root), slug, source_spec, tokenizer_spec)
        if earlier is None:
            raise
        return earlier
    key = json.dumps([FORMAT, source.identity, tokenizer_identity(tokenizer_spec)])
    path = Path(root) / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    with suppress(PHAError):  # none, or a damaged one
        return TokenStore.open(path)
    with claimed(path, wait=True):
        with suppress(PHAError):  # another process has made it meanwhile
            return TokenStore.open(path)
        return _make_store(source, shown_url(source_spec), tokenizer_spec, path, "auto", progress)


def _latest_store(root: Path, slug: str, source: str, tokenizer: str) -> TokenStore | None:
    """The store of a source below `root` that was written last, whatever the source's revision."""
    for path in sorted(root.glob(f"{slug}-*/{RECORD}"), key=lambda path: -path.stat().st_mtime_ns):
        with suppress(PHAError):
            store = TokenStore.open(path.parent)
            facts = store.describe()
            if (facts["source"], facts["tokenizer"]) == (source, tokenizer):
                return store
    return None


def _require_replaceable(out: Path) -> None:
    require_folder(out, replaced=True)
    entries = {path.name for path in out.iterdir()} if out.exists() else set()
    if entries and not is_store(out):
        raise PHAError(f"{out} exists and is not a token store: remove it or name another folder")
    if theirs := entries - STORE_FILES:
        raise PHAError(f"{out} holds {min(theirs)}, which is not of the store and would be lost")


def _make_store(
    source: Source,
    source_name: str,
    tokenizer_spec: str,
    out: Path,
    separator: Separator,
    progress: Progress | None,
    part: Part | None = None,
) -> TokenStore:
    own = source.part(*part) if part else source
    if separator == "auto":
        separator = "none" if source.joins_documents else "end-of-text"
    report = progress or (lambda state: None)
    texts = _TrainingTexts(source, report)
    tokenizer = load_tokenizer(tokenizer_spec, texts)
    end_of_text = tokenizer.eos_token_id if separator == "end-of-text" else None
    if separator == "end-of-text" and end_of_text is None:
        raise PHAError(
            f"the tokenizer {tokenizer_spec} has no end-of-text token: use separator none"
        )
    vocab_size = vocabulary_size(tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    with atomic_folder(out) as folder, ExitStack() as files:
        writers = {
            split: SplitWriter(folder, split, DTYPES[dtype], end_of_text) for split in source.splits
        }
        for writer in writers.values():
            files.enter_context(writer.file)
        lines = files.enter_context((folder / SPLIT_LINES).open("wb")) if part else None
        split_sha256 = _encode(own, tokenizer, writers, lines, report)
        entries = {split: writer.finish() for split, writer in writers.items()}
        if part is None:
            require_text(source.description, entries, source.held_out is not None)
        tokenizer.save_pretrained(str(folder / TOKENIZER))
        record = {
            "format": FORMAT,
            "source": source_name,
            "description": source.description,
            "tokenizer": tokenizer_spec,
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "tokenizer_training_bytes": texts.bytes or None,
            "vocab_size": vocab_size,
            "dtype": dtype,
            "separator": separator,
            "split": {**source.split_rule, "sha256": split_sha256},
            "splits": entries,
        }
        if part is not None:
            record["part"] = {**part._asdict(), "listing": source.listing}
        write_json(folder / RECORD, record)
    return TokenStore(out, record)


class _Piece(NamedTuple):
    """A stretch of a document that may be encoded apart, not empty, with its counts."""

    text: str
    split: str
    is_first: bool
    words: int
    lines: int
    bytes: int


def _encode(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    writers: dict[str, SplitWriter],
    lines: IO[bytes] | None,
    report: Progress,
) -> str:
    """Write all documents in one pass and return the hash of their split; `lines` gets its text."""
    encoder = TextEncoder(tokenizer)
    split_hash = hashlib.sha256()

    def hash_line(line: bytes) -> None:
        split_hash.update(line)
        if lines is not None:
            lines.write(line)

    meter = Meter()
    documents = size = tokens = 0
    report(PreparationState("encoding", None, documents, size, tokens))
    pieces = _pieces(source.documents(meter=meter), encoder, hash_line)
    with closing(_encode_ahead(_batches(pieces), encoder)) as encoded:
        for batch, ids in encoded:
            for piece, piece_ids in zip(batch, ids, strict=True):
                writer = writers[piece.split]
                if piece.is_first:
                    writer.begin_document()
                    documents += 1
                writer.add(piece_ids, piece.words, piece.lines, piece.bytes)
                size += piece.bytes
                tokens += len(piece_ids)
            report(PreparationState("encoding", meter.fraction, documents, size, tokens))
    return split_hash.hexdigest()


def _pieces(
    documents: Iterable[Document], encoder: TextEncoder, hash_line: Callable[[bytes], None]
) -> Iterator[_Piece]:
    """Yield documents in pieces and hash a line of the split for each document that has text."""
    for document in documents:
        digest = hashlib.sha256()
        is_first = True
        for text in filter(None, encoder.pieces_of(document.parts)):
            data = text.encode()
            digest.update(data)
            counts = len(text.split()), text.count("\n"), len(data)
            yield _Piece(text, document.split, is_first, *counts)
            is_first = False
        if not is_first:
            hash_line(f"{digest.hexdigest()} {document.split}\n".encode())


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Yield the pieces in lists of `_BATCH_BYTES` of text or a little more."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_ahead(
    batches: Iterable[list[_Piece]], encoder: TextEncoder
) -> Generator[tuple[list[_Piece], list[np.ndarray]], None, None]:
    """Yield each batch with the ids of its pieces; the next one is read while one is encoded."""
    with ThreadPoolExecutor(1) as thread:
        earlier: tuple[list[_Piece], Future[list[np.ndarray]]] | None = None
        for batch in batches:
            future = thread.submit(encoder.encode_batch, [piece.text for piece in batch])
            if earlier is not None:
                yield earlier[0], earlier[1].result()
            earlier = batch, future
        if earlier is not None:
            yield earlier[0], earlier[1].result()


class _TrainingTexts:
    """The training text in pieces, up to `TRAINING_BYTES`; `bytes` counts what was read."""

    def __init__(self, source: Source, report: Progress) -> None:
        self._source = source
        self._report = report
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        meter = Meter()
        self._report(PreparationState("tokenizer", None, 0, 0, 0))
        for number, document in enumerate(self._source.documents("train", meter), start=1):
            for piece in cut(document.parts):
                yield piece
                self.bytes += len(piece.encode())
                capped = self.bytes / TRAINING_BYTES
                fraction = None if meter.fraction is None else max(meter.fraction, capped)
                self._report(PreparationState("tokenizer", fraction, number, self.bytes, 0))
                if capped >= 1:
                    return


def require_text(
    description: str, entries: Mapping[str, Mapping[str, Any]], is_held_out: bool
) -> None:
    """Refuse splits without a document.

    Args:
        description: of the source.
        entries: of the splits in store.json.
        is_held_out: whether splits other than train are held out of it.

    Raises:
        PHAError: a split has none.
    """
    for split, entry in entries.items():
        if entry["documents"] > 0:
            continue
        if is_held_out and split != "train":
            raise PHAError(
                f"no document of {description} falls into the {split} split: give more "
                "documents, a larger --holdout, or files named for their splits"
            )
        raise PHAError(f"the {split} split of {description} has no text: add some")
