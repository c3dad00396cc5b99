"""Data sets of the Hugging Face Hub, or in its layout, as streams of rows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from pha.data.documents import (
    Document,
    Meter,
    Source,
    SourceFacts,
    given_and_held_out,
    hold_out,
    splits_to_read,
)
from pha.data.files import files_identity
from pha.data.options import SourceOptions
from pha.data.readers import as_text, no_field
from pha.data.splits import canonical_splits
from pha.utils.errors import PHAError

HOLDOUT = Fraction(5, 1000)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WIKITEXT = re.compile(r"wikitext-(2|103)(-raw)?-v1")
_TIMEOUT = 10  # seconds for the Hub's first answer
_LINES = 256
_ROWS = 64  # rows turned into Python strings at once
_BY_NAME = {"rule": "splits of the data set"}


class HubUnreachableError(PHAError):
    """The Hub gives no answer, for want of a network or because it is not to be asked."""


class HubSource(Source):
    """Rows of a data set, read as a stream. A row is a document, but for WikiText.

    WikiText's rows are lines with their line end. Blank lines, which are a blank and a line feed
    in the files that the benchmark is defined on, are empty rows; they are restored here, so that
    a split is one document, equal to its file byte for byte.

    Args:
        dataset: the opened data set: a streaming one for each split.
        description: in one line.
        identity: what changes when the data set does.
        options: text field and split.

    Raises:
        PHAError: no train split, or no validation split in WikiText.
    """

    def __init__(
        self, dataset: Any, description: str, identity: str, options: SourceOptions
    ) -> None:
        self._rows = dataset
        self._field = options.text_field
        self._names = canonical_splits(dataset, description)
        configs = {str(rows.config_name) for rows in dataset.values()}
        self._is_wikitext = all(_WIKITEXT.fullmatch(config) for config in configs)
        if "train" not in self._names or (self._is_wikitext and "validation" not in self._names):
            has = ", ".join(dataset) or "none"
            raise PHAError(f"{description} lacks a train or validation split: it has {has}")
        self._held_out = options.hold_out(HOLDOUT, self._names)
        rule = self._held_out.describe() if self._held_out else _BY_NAME
        if self._held_out is None:
            options.require_unused(description, rule["rule"])
        words = [identity, self._field, str(rule)]
        super().__init__(
            SourceFacts(
                description=description,
                identity=hashlib.sha256("\0".join(words).encode()).hexdigest(),
                splits=given_and_held_out(self._names, self._held_out),
                joins_documents=self._is_wikitext,
                split_rule=rule,
            )
        )

    def documents(self, split: str | None = None, meter: Meter | None = None) -> Iterator[Document]:
        """Yield the rows of each split in the data set's order."""
        meter = meter or Meter()
        wanted = splits_to_read(self, self._names, self._held_out, split)
        meter.done, meter.total = 0, self._count_rows(wanted)
        for name in wanted:
            if self._is_wikitext:
                yield Document(name, name, self._lines(name, meter))
                continue
            rows = enumerate(self._texts(name, meter), start=1)
            documents = (Document(f"{name}:{number}", name, (text,)) for number, text in rows)
            for document in hold_out(documents, self._held_out):
                if split in (None, document.split):
                    yield document

    def _count_rows(self, splits: list[str]) -> int | None:
        """Rows of `splits`, where the data set's card tells."""
        known = [(self._rows[self._names[s]].info.splits or {}).get(self._names[s]) for s in splits]
        counts = [int(info.num_examples or 0) if info is not None else 0 for info in known]
        return sum(counts) if all(counts) else None

    def _lines(self, split: str, meter: Meter) -> Iterator[str]:
        """The text of a WikiText split as its file has it, some hundred lines at a time."""
        block: list[str] = []
        for text in self._texts(split, meter):
            block.append(text or " \n")
            if len(block) == _LINES:
                yield "".join(block)
                block = []
        yield "".join(block)

    def _texts(self, split: str, meter: Meter) -> Iterator[str]:
        name = self._names[split]
        where = f"split {name} of {self.description}"
        rows = self._rows[name]
        number = 0
        try:
            if rows.column_names is not None and self._field in rows.column_names:
                rows = rows.select_columns(self._field)
            for batch in rows.iter(batch_size=_ROWS):
                if self._field not in batch:
                    raise no_field(where, self._field, batch)
                for value in batch[self._field]:
                    number += 1
                    yield as_text(value, self._field, f"row {number} of {where}")
                meter.done += len(batch[self._field])
        except PHAError:
            raise
        except Exception as error:  # whatever the many formats and file systems raise
            raise PHAError(
                f"reading {where} failed after {number} rows ({_first_line(error)}): "
                "check the network or the files, and start again"
            ) from error


def open_hub(name: str, options: SourceOptions) -> Source:
    """Open a data set as a stream.

    Args:
        name: OWNER/NAME, OWNER/NAME:CONFIG, FOLDER or FOLDER:CONFIG.
        options: text field and split.

    Raises:
        HubUnreachableError: no answer from the Hub.
        PHAError: `datasets` is not installed, or there is no such data set or configuration.
    """
    try:
        import datasets
        from datasets.utils.logging import set_verbosity_error
    except ImportError as error:
        raise PHAError("data sets of the Hub need datasets: pip install 'pha[data]'") from error

    place, _, config = (name, "", "") if Path(name).expanduser().is_dir() else name.rpartition(":")
    place, config = (place, config) if place else (config, "")
    folder = Path(place).expanduser()
    revision = None
    if folder.is_dir():
        description, place = f"data set folder {folder.name}", str(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        identity = files_identity([config], files)
    else:
        revision = _revision(place)
        description = f"Hugging Face Hub data set {place}"
        identity = f"{place} {config} {revision}"
    description += f", config {config}" if config else ""
    description += f", revision {revision}" if revision else ""
    datasets.disable_progress_bars()
    set_verbosity_error()
    try:
        dataset = datasets.load_dataset(place, config or None, streaming=True, revision=revision)
    except Exception as error:  # of many kinds, from missing files to unknown configurations
        raise PHAError(f"{description} cannot be opened: {_first_line(error)}") from error
    return HubSource(dataset, description, identity, options)


def _revision(name: str) -> str:
    """The commit that a data set of the Hub is at."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if not _HUB_NAME.fullmatch(name):
        raise PHAError(f"no folder hf:{name}, and no name of the Hub's form OWNER/NAME")
    try:
        return str(HfApi().dataset_info(name, timeout=_TIMEOUT).sha)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise PHAError(
            f"the Hugging Face Hub has no public data set {name!r}: check the name, or log in "
            "with `hf auth login` if it is private or gated"
        ) from error
    except Exception as error:  # network errors have no common class
        raise HubUnreachableError(
            f"the Hugging Face Hub does not answer for data set {name!r} ({_first_line(error)}): "
            "check the network, or download it elsewhere and use hf:FOLDER:CONFIG"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
