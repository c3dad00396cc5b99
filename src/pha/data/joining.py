"""Joining the parts of a store that `prepare` made one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pha.data.parts import SPLIT_LINES, Part
from pha.data.preparation import PreparationState, Progress, require_text
from pha.data.store import RECORD, TOKENIZER, Counts, TokenStore, unusable
from pha.utils.errors import PHAError
from pha.utils.files import copy_folder, remove_leftovers, write_json
from pha.utils.formats import read_json
from pha.utils.outputs import claimed, require_folder

_BLOCK = 1 << 24  # bytes read at once


def join(folder: Path, progress: Progress | None = None) -> TokenStore:
    """Make the parts in a folder one store, equal in tokens and hashes to that of one process.

    Every file of the parts is read once, and stays where it is.

    Raises:
        PHAError: a part that is missing, damaged, or of another division, source or tokenizer; a
            split without text.
    """
    require_folder(folder)
    parts = _find_parts(folder)
    with claimed(folder / RECORD):
        stores = [TokenStore.open(folder / part.folder, verify=False) for part in parts]
        records = [read_json(store.path / RECORD) for store in stores]
        _require_alike(folder, parts, records)
        record = {key: value for key, value in records[0].items() if key != "part"}
        record["split"] = record["split"] | {"sha256": _split_sha256(stores, records)}
        record["splits"] = _join_splits(stores, records, progress or (lambda state: None))
        require_text(record["description"], record["splits"], "seed" in record["split"])
        remove_leftovers(folder, TOKENIZER)
        copy_folder(stores[0].path / TOKENIZER, folder / TOKENIZER)
        write_json(folder / RECORD, record | {"parts": len(parts)})
    return TokenStore.open(folder, verify=False)


def _find_parts(folder: Path) -> list[Part]:
    """All parts of the one division that is in a folder."""
    found = [part for path in folder.glob("part-*") if (part := Part.of_folder(path.name))]
    divisions = {part.of for part in found}
    if not found:
        raise PHAError(f"{folder} has no parts: make them with `pha prepare ... --part K/N`")
    if len(divisions) > 1:
        raise PHAError(
            f"{folder} has parts of several divisions ({min(found)} and {max(found)}): remove "
            "those of one"
        )
    for part in (Part(number, *divisions) for number in range(1, *(n + 1 for n in divisions))):
        if part not in found:
            raise PHAError(
                f"{folder} lacks {part}: make it with --part {part.number}/{part.of}, or copy its "
                f"folder {part.folder} there"
            )
    return sorted(found)


def _require_alike(folder: Path, parts: Sequence[Part], records: Sequence[dict[str, Any]]) -> None:
    """Refuse folders that hold other parts, and parts that do not belong together."""
    first: dict[str, Any] = {}
    for part, record in zip(parts, records, strict=True):
        path, own = folder / part.folder, record.get("part")
        # A copy under the name of another part would have its text twice, and that of the other
        # not at all.
        if not isinstance(own, dict) or [own.get("number"), own.get("of")] != [*part]:
            raise PHAError(f"{path} does not hold {part}: make it again, or give it its own name")
        shared = _shared(record)
        first = first or shared
        for words, value in shared.items():
            if value != first[words]:
                raise PHAError(f"{path} has another {words} than part 1: prepare one of them again")


def _shared(record: dict[str, Any]) -> dict[str, Any]:
    rule = {key: value for key, value in record.get("split", {}).items() if key != "sha256"}
    return {
        "source": record["description"],
        "list of files": record["part"].get("listing"),
        "tokenizer": record["tokenizer_sha256"],
        "separator": record["separator"],
        "rule of the split": rule,
    }


def _split_sha256(stores: Sequence[TokenStore], records: Sequence[dict[str, Any]]) -> str:
    """The hash of the whole split: of the lines of all parts, one after the other."""
    whole = hashlib.sha256()
    for store, record in zip(stores, records, strict=True):
        path, own = store.path / SPLIT_LINES, hashlib.sha256()
        if not path.is_file():
            raise unusable(path, "is missing")
        _read(path, own.update, whole.update)
        if own.hexdigest() != record.get("split", {}).get("sha256"):
            raise unusable(path, "is not what was written for this part")
    return whole.hexdigest()


def _join_splits(
    stores: Sequence[TokenStore], records: Sequence[dict[str, Any]], report: Progress
) -> dict[str, dict[str, Any]]:
    """The entries of the splits in store.json: counts and hashes of the whole, and of each part."""
    total = sum(store.counts(split).tokens for store in stores for split in store.splits)
    entries, documents, size, tokens = {}, 0, 0, 0
    report(PreparationState("joining", None, documents, size, tokens))
    for split in stores[0].splits:
        ids, starts = hashlib.sha256(), hashlib.sha256()
        counts, shards = np.zeros(len(asdict(Counts())), dtype=np.int64), []
        for store, record in zip(stores, records, strict=True):
            entry, own = record["splits"][split], hashlib.sha256()
            path = store.path / f"{split}.bin"
            _read(path, ids.update, own.update)
            if own.hexdigest() != entry["sha256"]:
                raise unusable(path, "is altered, as its SHA-256 is not the recorded one")
            starts.update((store.document_starts(split) + counts[0]).tobytes())
            here = store.counts(split)
            counts += list(asdict(here).values())
            shards.append(entry)
            documents, size = documents + here.documents, size + here.bytes
            tokens += here.tokens
            report(PreparationState("joining", tokens / max(1, total), documents, size, tokens))
        entries[split] = {
            **asdict(Counts(*counts.tolist())),
            "sha256": ids.hexdigest(),
            "document_starts_sha256": starts.hexdigest(),
            "shards": shards,
        }
    return entries


def _read(path: Path, *updates: Callable[[bytes], None]) -> None:
    with path.open("rb") as file:
        for block in iter(partial(file.read, _BLOCK), b""):
            for update in updates:
                update(block)
