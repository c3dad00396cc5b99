"""What a corpus is to the rest of the package: documents, each in a split, read in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pha.data.splits import TextSplit
from pha.utils.errors import PHAError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """One text, unchanged.

    Attributes:
        name: where it is from, unique in its source.
        split: one of `SPLITS`.
        parts: the text in pieces that join to it; those of a long file can be read only once.
    """

    name: str
    split: str
    parts: Iterable[str]

    @property
    def text(self) -> str:
        """The whole text (this reads `parts`)."""
        return "".join(self.parts)


@dataclass
class Meter:
    """How far a pass over a source is.

    Attributes:
        done: read so far, in bytes of files or in rows.
        total: of the same, all there is to read; None where that is not known.
    """

    done: int = 0
    total: int | None = None

    @property
    def fraction(self) -> float | None:
        """Between 0 and 1, or None where the total is not known."""
        return min(1.0, self.done / self.total) if self.total else None


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a source before it is read.

    Attributes:
        description: what the corpus is, in one line.
        identity: a hash that changes when what the source reads, or its splits, do.
        splits: those it has, in the order of `SPLITS`.
        joins_documents: whether a split is one running text, so that nothing is put between its
            documents.
        split_rule: how documents were given to splits, ready for JSON; `rule` says it in words.
    """

    description: str
    identity: str
    splits: tuple[str, ...]
    joins_documents: bool
    split_rule: dict[str, Any] = field(default_factory=dict)


class Source(ABC):
    """A corpus in splits. Opening one lists files; texts are read when documents are asked for."""

    def __init__(self, facts: SourceFacts) -> None:
        self.description = facts.description
        self.identity = facts.identity
        self.splits = facts.splits
        self.joins_documents = facts.joins_documents
        self.split_rule = facts.split_rule

    @abstractmethod
    def documents(self, split: str | None = None, meter: Meter | None = None) -> Iterator[Document]:
        """Yield the documents of a split, or of all in one pass, in the same order every time.

        The parts of a document have to be read before the next document is asked for.

        Raises:
            PHAError: a text that cannot be read, or is not UTF-8.
        """


def hold_out(documents: Iterable[Document], rule: TextSplit | None) -> Iterator[Document]:
    """Give each training document to the split that `rule` puts its text into."""
    for document in documents:
        if rule is None or document.split != "train":
            yield document
        else:
            text = document.text
            yield Document(document.name, rule.split_of(text), (text,))


def splits_to_read(
    source: Source, given: Iterable[str], rule: TextSplit | None, split: str | None
) -> list[str]:
    """Which of the `given` splits documents of `split` (None: of any) can come from, in order.

    Raises:
        PHAError: the source has no such split.
    """
    if split is not None and split not in source.splits:
        has = ", ".join(source.splits)
        raise PHAError(f"{source.description} has no {split} split: it has {has}")
    wanted = {split, "train" if rule is not None else split}
    present = set(given)
    return [name for name in SPLITS if name in present and (split is None or name in wanted)]


def given_and_held_out(given: Iterable[str], rule: TextSplit | None) -> tuple[str, ...]:
    """The splits of a source, in order: those it has as files or rows, and those held out."""
    present = {*given, *(rule.held if rule else ())}
    return tuple(split for split in SPLITS if split in present)
