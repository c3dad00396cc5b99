"""What a corpus is to the rest of the package: documents, each in a split, read in one pass."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from pha.data.readers import Meter
from pha.data.remote import TextFile, version_of
from pha.data.splits import SPLITS, TextSplit
from pha.utils.errors import PHAError


@dataclass(frozen=True)
class Document:
    """One text, unchanged.

    Attributes:
        split: one of `SPLITS`.
        parts: the text in pieces that join to it; those of a long file can be read only once.
    """

    split: str
    parts: Iterable[str]

    @property
    def text(self) -> str:
        """The whole text (this reads `parts`)."""
        return "".join(self.parts)


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source and split it, where the source leaves that open.

    Attributes:
        text_field: of records, the field with the text.
        holdout: share of documents in each split that is held out by a hash of the text, or None
            for the source's default (5% of files, 0.5% of Hub data sets).
        split_seed: of that hash; None for 0.

    Raises:
        PHAError: a value out of range.
    """

    text_field: str = "text"
    holdout: Fraction | None = None
    split_seed: int | None = None

    def __post_init__(self) -> None:
        if self.holdout is not None and not 0 < self.holdout < Fraction(1, 2):
            raise PHAError(
                f"a holdout of {self.holdout} leaves nothing to a split: "
                "give a fraction between 0 and 0.5, such as 0.05"
            )
        if self.split_seed is not None and self.split_seed < 0:
            raise PHAError(f"the split seed is {self.split_seed}: give 0 or more")

    def split_rule(
        self,
        description: str,
        given: Collection[str],
        otherwise: dict[str, Any],
        holdout: Fraction | None = None,
    ) -> tuple[TextSplit | None, dict[str, Any]]:
        """What holds documents out of a source's train split, and its rule ready for JSON.

        Args:
            description: of the source.
            given: splits that are there.
            otherwise: the rule where nothing is held out.
            holdout: what is held out where validation is not given; None: never anything.

        Raises:
            PHAError: options for a hash of the text where that is not the rule.
        """
        if holdout is not None and "validation" not in given:
            held = tuple(split for split in ("test", "validation") if split not in given)
            split = TextSplit(self.split_seed or 0, self.holdout or holdout, held)
            return split, split.describe()
        if self.holdout is not None or self.split_seed is not None:
            raise PHAError(
                f"{description} is split by another rule ({otherwise['rule']}): leave out "
                "--holdout and --split-seed"
            )
        return None, otherwise


@dataclass(frozen=True)
class Unit:
    """What is read as a whole: a file, or all of a split where its files make one text.

    Attributes:
        split: the given split it is of.
        name: the same on every machine.
        size: what a meter counts while it is read, None if that is not known.
        read: yields its texts, each in parts that join to it, in the same order every time.
    """

    split: str
    name: str
    size: int | None
    read: Callable[[Meter], Iterator[Iterable[str]]]


@dataclass(frozen=True)
class Source:
    """A corpus in splits. Opening one lists files; texts are read when documents are asked for.

    Attributes:
        description: what the corpus is, in one line.
        identity: a hash that changes when what the source reads, or its splits, do.
        joins_documents: whether a split is one running text, so that nothing is put between its
            documents.
        given: the splits that are there.
        held_out: what holds others out of the train split, if anything does.
        split_rule: how documents were given to splits, ready for JSON; `rule` says it in words.
        units: all there is to read, in the order of `SPLITS`.
    """

    description: str
    identity: str
    joins_documents: bool
    given: Collection[str]
    held_out: TextSplit | None
    split_rule: dict[str, Any]
    units: tuple[Unit, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits, in the order of `SPLITS`: those given and those held out."""
        held = self.held_out.held if self.held_out else ()
        return tuple(split for split in SPLITS if split in {*self.given, *held})

    def documents(self, split: str | None = None, meter: Meter | None = None) -> Iterator[Document]:
        """Yield the documents of a split, or of all in one pass, in the same order every time.

        The parts of a document have to be read before the next document is asked for.

        Raises:
            PHAError: no such split; a text that cannot be read, or is not UTF-8.
        """
        if split is not None and split not in self.splits:
            has = ", ".join(self.splits)
            raise PHAError(f"{self.description} has no {split} split: it has {has}")
        origin = split if split is None or split in self.given else "train"
        units = [unit for unit in self.units if origin in (None, unit.split)]
        sizes = [unit.size for unit in units]
        meter = meter or Meter()
        meter.done, meter.total = 0, None if None in sizes else sum(size or 0 for size in sizes)
        for unit in units:
            for parts in unit.read(meter):
                document = Document(unit.split, parts)
                if unit.split == "train" and self.held_out:
                    text = document.text
                    document = Document(self.held_out.split_of(text), (text,))
                if split in (None, document.split):
                    yield document

    def part(self, number: int, of: int) -> Source:
        """Part `number`, from 1, of a division into stretches of as many units, or one fewer.

        All parts one after the other are the whole, in its order.

        Raises:
            PHAError: fewer units than parts.
        """
        count = len(self.units)
        if count < of:
            raise PHAError(
                f"{self.description} cannot be divided into {of} parts, as it is read in {count}: "
                "ask for fewer, or give the text in more files"
            )
        return replace(self, units=self.units[(number - 1) * count // of : number * count // of])

    @property
    def listing(self) -> str:
        """A hash of the units' splits, names and sizes: what a division rests on."""
        listed = [[unit.split, unit.name, unit.size] for unit in self.units]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def joined(sources: Sequence[Source], description: str) -> Source:
    """Several sources as one, split by split; each is a text of its own.

    Raises:
        PHAError: they are split by different rules.
    """
    first = sources[0]
    for other in sources[1:]:
        if (other.held_out, other.split_rule) != (first.held_out, first.split_rule):
            raise PHAError(
                f"{first.description} and {other.description} are split by different rules "
                f"({first.split_rule['rule']}; {other.split_rule['rule']}): prepare them apart"
            )
    units = [unit for source in sources for unit in source.units]
    return replace(
        first,
        description=description,
        identity=identity_of([description, *(source.identity for source in sources)]),
        joins_documents=first.joins_documents and len(sources) == 1,
        given={split for source in sources for split in source.given},
        units=tuple(sorted(units, key=lambda unit: SPLITS.index(unit.split))),
    )


def identity_of(words: Iterable[str], files: Iterable[TextFile] = ()) -> str:
    """A hash of what a source is known by, and of every file's path, size and date."""
    digest = hashlib.sha256(os.fsencode("\0".join(words)))
    for file in files:
        digest.update(os.fsencode(f"\0{version_of(file)}"))
    return digest.hexdigest()
