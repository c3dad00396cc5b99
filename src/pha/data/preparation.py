"""Making a token store: one pass over a corpus, encoded in parallel, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pha.data.documents import Meter, Source
from pha.data.encoding import TextEncoder, cut_parts
from pha.data.hub import HubUnreachableError
from pha.data.options import SourceOptions
from pha.data.pieces import batches, document_pieces
from pha.data.pool import encode_batches, usable_cores
from pha.data.sources import open_source
from pha.data.splits import SplitHash
from pha.data.store import DTYPES, FORMAT, RECORD, TOKENIZER, TokenStore, is_store
from pha.data.tokenizer import (
    load_tokenizer,
    tokenizer_identity,
    tokenizer_sha256,
    vocabulary_size,
)
from pha.data.writer import StoreWriter
from pha.utils.errors import PHAError
from pha.utils.files import atomic_folder, remove_leftovers, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Separator = Literal["auto", "end-of-text", "none"]

TRAINING_BYTES = 1_000_000_000
"""A tokenizer is trained on so much of the training text, or a little more, at most."""


@dataclass(frozen=True)
class PreparationState:
    """How far a preparation is; each stage begins with one in which nothing is done.

    Attributes:
        stage: `tokenizer` (reading text to train one) or `encoding`.
        fraction: of the stage, between 0 and 1; None where the amount of text is not known.
        documents: done in this stage, and likewise
        bytes: of text and
        tokens: none for the tokenizer.
    """

    stage: str
    fraction: float | None
    documents: int
    bytes: int
    tokens: int


Progress = Callable[[PreparationState], None]


@dataclass(frozen=True)
class _Request:
    """What a store is to be made of."""

    source_spec: str
    tokenizer_spec: str
    separator: Separator = "auto"
    workers: int | None = None


def prepare(
    source_spec: str,
    tokenizer_spec: str,
    out: Path,
    *,
    separator: Separator = "auto",
    options: SourceOptions | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Encode a corpus into a token store.

    Text is streamed: memory holds a few megabytes for each worker and the document (or row group)
    being read, not the corpus.

    Args:
        source_spec: see `open_source`.
        tokenizer_spec: see `load_tokenizer`; `bpe:SIZE` is trained on the first
            `TRAINING_BYTES` of the train split, in a pass of its own.
        out: the store's folder; an existing store there is replaced when the new one is whole.
        separator: `end-of-text` ends every document with that token, `none` puts nothing between
            them, `auto` picks `none` where a split is one running text (a single file, text files
            named for their split, WikiText) and `end-of-text` elsewhere.
        options: text field and split of the source, where it leaves them open.
        workers: processes that encode; None for the number of usable cores. The store is the same
            for any number, and small corpora are encoded without.
        progress: told how far the work is.

    Raises:
        PHAError: see `open_source` and `load_tokenizer`; `out` exists and is no store or cannot
            be written; a split without text; a worker that died.
    """
    request = _Request(source_spec, tokenizer_spec, separator, workers)
    return _prepare(open_source(source_spec, options), request, Path(out), progress)


def cached_store(
    source_spec: str,
    tokenizer_spec: str,
    root: Path,
    progress: Progress | None = None,
    *,
    options: SourceOptions | None = None,
    workers: int | None = None,
) -> TokenStore:
    """Open the store of a corpus and tokenizer below `root`, after preparing it if need be.

    Its folder is named for both and for a hash that changes with the corpus's files (their names,
    sizes and dates), a Hub data set's revision, the split, the tokenizer's files and the Python
    version that `stdlib` comes from. A damaged store is prepared again. Where the Hub does not
    answer, the latest store made of the same data set is taken.

    Raises:
        PHAError: see `prepare`.
    """
    names = f"{Path(source_spec).name} {Path(tokenizer_spec).name}"
    slug = "-".join(re.findall(r"[a-z0-9]+", names.lower()))[:48]
    try:
        source = open_source(source_spec, options)
    except HubUnreachableError:
        earlier = _latest_store(Path(root), slug, source_spec, tokenizer_spec)
        if earlier is None or options is not None:
            raise
        return earlier
    key = json.dumps([FORMAT, source.identity, tokenizer_identity(tokenizer_spec)])
    path = Path(root) / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (path / RECORD).is_file():
        try:
            return TokenStore.open(path)
        except PHAError:
            pass  # prepared anew below
    request = _Request(source_spec, tokenizer_spec, workers=workers)
    return _prepare(source, request, path, progress)


def _latest_store(root: Path, slug: str, source: str, tokenizer: str) -> TokenStore | None:
    """The store of a source below `root` that was written last, whatever the source's revision."""
    found = sorted(root.glob(f"{slug}-*/{RECORD}"), key=lambda path: -path.stat().st_mtime_ns)
    for path in found:
        try:
            store = TokenStore.open(path.parent)
        except PHAError:
            continue
        facts = store.describe()
        if (facts["source"], facts["tokenizer"]) == (source, tokenizer):
            return store
    return None


def _prepare(source: Source, request: _Request, out: Path, progress: Progress | None) -> TokenStore:
    _require_replaceable(out)
    if request.workers is not None and request.workers < 1:
        raise PHAError(f"there cannot be {request.workers} workers: give 1 or more")
    separator = _separator(request.separator, source)
    report = progress or (lambda state: None)
    texts = _TrainingTexts(source, report)
    tokenizer = load_tokenizer(request.tokenizer_spec, texts)
    if separator == "end-of-text" and tokenizer.eos_token_id is None:
        raise PHAError(
            f"the tokenizer {request.tokenizer_spec} has no end-of-text token: use separator none"
        )
    vocab_size = vocabulary_size(tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    try:
        remove_leftovers(out)
        with atomic_folder(out) as folder:
            end_of_text = tokenizer.eos_token_id if separator == "end-of-text" else None
            with StoreWriter(folder, source.splits, DTYPES[dtype], end_of_text) as writer:
                split_sha256 = _encode(source, tokenizer, writer, request.workers, report, dtype)
                entries = writer.finish()
            _require_text(source, entries)
            tokenizer.save_pretrained(str(folder / TOKENIZER))
            record = {
                "format": FORMAT,
                "source": request.source_spec,
                "description": source.description,
                "tokenizer": request.tokenizer_spec,
                "tokenizer_sha256": tokenizer_sha256(tokenizer),
                "tokenizer_training_bytes": texts.bytes or None,
                "vocab_size": vocab_size,
                "dtype": dtype,
                "separator": separator,
                "split": {**source.split_rule, "sha256": split_sha256},
                "splits": entries,
            }
            write_json(folder / RECORD, record)
    except OSError as error:
        raise PHAError(
            f"the token store {out} cannot be written ({error.strerror or error})"
        ) from error
    return TokenStore.open(out, verify=False)


def _encode(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    writer: StoreWriter,
    workers: int | None,
    report: Progress,
    dtype: str,
) -> str:
    """Write all documents in one pass and return the hash of their split."""
    encoder = TextEncoder(tokenizer)
    split_hash = SplitHash()
    meter = Meter()
    pieces = document_pieces(source.documents(meter=meter), encoder, split_hash)
    documents = size = tokens = 0
    report(PreparationState("encoding", None, documents, size, tokens))
    results = encode_batches(batches(pieces), encoder, DTYPES[dtype], workers or usable_cores())
    with closing(results):
        for batch, encoded in results:
            writer.add(batch, encoded)
            documents += sum(piece.is_last for piece in batch)
            size += sum(len(piece.data) for piece in batch)
            tokens += len(encoded.ids)
            report(PreparationState("encoding", meter.fraction, documents, size, tokens))
    return split_hash.hexdigest()


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
            for piece in cut_parts(document.parts):
                yield piece
                self.bytes += len(piece.encode())
                capped = self.bytes / TRAINING_BYTES
                fraction = None if meter.fraction is None else max(meter.fraction, capped)
                self._report(PreparationState("tokenizer", fraction, number, self.bytes, 0))
                if capped >= 1:
                    return


def _separator(asked: Separator, source: Source) -> Literal["end-of-text", "none"]:
    if asked not in get_args(Separator):
        raise PHAError(f"no separator {asked!r}: give one of {', '.join(get_args(Separator))}")
    if asked == "auto":
        return "none" if source.joins_documents else "end-of-text"
    return asked


def _require_text(source: Source, entries: dict[str, dict[str, Any]]) -> None:
    for split, entry in entries.items():
        if entry["documents"] > 0:
            continue
        if "seed" in source.split_rule and split != "train":
            raise PHAError(
                f"no document of {source.description} falls into the {split} split: give more "
                "documents, a larger --holdout, or files named for their splits"
            )
        raise PHAError(f"the {split} split of {source.description} has no text: add some")


def _require_replaceable(out: Path) -> None:
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not (is_free or is_store(out)):
        raise PHAError(f"{out} exists and is not a token store: remove it or name another folder")
