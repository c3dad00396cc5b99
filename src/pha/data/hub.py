"""Data sets of the Hugging Face Hub, or in its layout, as streams of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import Any

from pha.data.documents import Source, SourceOptions, Unit, identity_of
from pha.data.readers import Meter, open_rows, read_rows
from pha.data.remote import first_line
from pha.data.splits import SPLIT_WORDS, SPLITS
from pha.utils.errors import PHAError
from pha.utils.files import user_path

HOLDOUT = Fraction(5, 1000)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WIKITEXT = re.compile(r"wikitext-(2|103)(-raw)?-v1")
_TIMEOUT = 10  # seconds for the Hub's first answer
_LINES = 256
_BY_NAME = {"rule": "splits of the data set"}


class HubUnreachableError(PHAError):
    """The Hub gives no answer, for want of a network or because it is not to be asked."""


def open_hub(spec: str, options: SourceOptions) -> Source:
    """Open a data set as a stream. A row is a document, but for WikiText.

    WikiText's rows are lines with their line end. Blank lines, which are a blank and a line feed
    in the files that the benchmark is defined on, are empty rows; they are restored here, so that
    a split is one document, equal to its file byte for byte.

    Args:
        spec: OWNER/NAME, OWNER/NAME:CONFIG, FOLDER or FOLDER:CONFIG.
        options: text field and split.

    Raises:
        HubUnreachableError: no answer from the Hub.
        PHAError: `datasets` is not installed; no such data set or configuration; no train split,
            or no validation split in WikiText.
    """
    place, _, config = (spec, "", "") if user_path(spec).is_dir() else spec.rpartition(":")
    place, config = (place, config) if place else (config, "")
    folder = user_path(place)
    if folder.is_dir():
        revision, place, description = None, str(folder), f"data set folder {folder.name}"
        identity = identity_of([config], sorted(p for p in folder.rglob("*") if p.is_file()))
    else:
        revision = _revision(place)
        description = f"Hugging Face Hub data set {place}"
        identity = f"{place} {config} {revision}"
    description += f", config {config}" if config else ""
    description += f", revision {revision}" if revision else ""

    dataset = open_rows(place, config or None, description, revision=revision)
    names = _split_names(dataset, description)
    is_wikitext = all(_WIKITEXT.fullmatch(str(rows.config_name)) for rows in dataset.values())
    if "train" not in names or (is_wikitext and "validation" not in names):
        has = ", ".join(dataset) or "none"
        raise PHAError(f"{description} lacks a train or validation split: it has {has}")
    held_out, rule = options.split_rule(description, names, _BY_NAME, HOLDOUT)

    def units(split: str) -> Iterator[Unit]:
        """The files of a split; all of WikiText's, whose rows are of one text."""
        name = names[split]
        rows, where = dataset[name], f"split {name} of {description}"
        # Where the data set's card tells the rows, each file has about as many.
        known = (rows.info.splits or {}).get(name)
        count = 1 if is_wikitext else rows.num_shards
        size = None if known is None else int(known.num_examples or 0) // count
        for number in range(count):
            one = where if count == 1 else f"file {number + 1} of {count} of {where}"
            shard = rows if count == 1 else rows.shard(count, number)
            yield Unit(split, one, size, partial(read, shard, one))

    def read(rows: Any, where: str, meter: Meter) -> Iterator[Iterable[str]]:
        texts = read_rows(rows, options.text_field, where, meter)
        if is_wikitext:
            yield _wikitext(texts)
        else:
            for text in texts:
                yield (text,)

    return Source(
        description=description,
        identity=identity_of([identity, options.text_field, str(rule)]),
        joins_documents=is_wikitext,
        given=names,
        held_out=held_out,
        split_rule=rule,
        units=tuple(unit for split in SPLITS if split in names for unit in units(split)),
    )


def _split_names(names: Iterable[str], where: str) -> dict[str, str]:
    """From our name of a split to the name that a data set has for it; others are left out."""
    found: dict[str, str] = {}
    for name in names:
        split = SPLIT_WORDS.get(name)
        if split in found:
            raise PHAError(
                f"{where} has two splits for {split} ({found[split]} and {name}): use local files "
                "with one of them"
            )
        if split is not None:
            found[split] = name
    return found


def _wikitext(rows: Iterator[str]) -> Iterator[str]:
    """The text of a WikiText split as its file has it, some hundred lines at a time."""
    while lines := list(islice(rows, _LINES)):
        yield "".join(line or " \n" for line in lines)


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
            f"the Hugging Face Hub does not answer for data set {name!r} ({first_line(error)}): "
            "check the network, or download it elsewhere and use hf:FOLDER:CONFIG"
        ) from error
